"""Places of ranks: whole nodes, servers that stay on theirs, and what is refused."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, TransferConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.topology import Device, Slots, place, place_nodes, visible

CLUSTERS = Path(__file__).parents[2] / "recipes" / "clusters"


def config(parallel: ParallelConfig, servers: int, width: int, transport: str = "nccl", urls: tuple[str, ...] = ()) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path="x"),
        data=DataConfig(train="x"),
        parallel=parallel,
        rollout=RolloutConfig(servers=servers, tensor_parallel=width, urls=list(urls)),
        transfer=TransferConfig(transport=transport),
    )


@pytest.fixture
def cluster() -> ClusterConfig:
    return load_cluster(CLUSTERS / "h100x128.yaml")


def test_70b_takes_twelve_nodes_and_four(cluster: ClusterConfig) -> None:
    found = place(config(ParallelConfig(tensor=8, pipeline=4, data=3), 4, 8), cluster)
    assert (found.trainer_nodes, found.engine_nodes, found.nodes) == (tuple(range(12)), (12, 13, 14, 15), 16)
    assert found.trainer[95] == Device(11, 7)
    assert not found.is_colocated


def test_trainer_and_engines_share_a_node_that_holds_both(cluster: ClusterConfig) -> None:
    found = place(config(ParallelConfig(data=4), 2, 2), cluster)
    assert found.engines == ((Device(0, 4), Device(0, 5)), (Device(0, 6), Device(0, 7)))
    assert not found.is_colocated


def test_engines_that_read_gpu_memory_are_on_the_trainers_gpus(cluster: ClusterConfig) -> None:
    found = place(config(ParallelConfig(data=8), 4, 2, "cuda_ipc"), cluster)
    assert found.is_colocated
    assert {device for engine in found.engines for device in engine} == set(found.trainer)


def test_servers_that_run_already_take_no_node(cluster: ClusterConfig) -> None:
    found = place(config(ParallelConfig(data=8), 4, 8, urls=("http://a:1",)), cluster)
    assert (found.engines, found.nodes) == ((), 1)


@pytest.mark.parametrize(
    ("parallel", "servers", "width", "transport", "message"),
    [
        (ParallelConfig(data=12), 1, 1, "nccl", r"12 trainer ranks do not fill nodes of 8 GPUs; .*: 8 and 16"),
        (ParallelConfig(data=8), 1, 16, "nccl", r"rollout\.tensor_parallel: given 16; .* has 8 GPUs"),
        (ParallelConfig(data=16), 1, 8, "cuda_ipc", r"cuda_ipc: 1 servers × 8 ranks .* transfer\.transport=nccl"),
        (ParallelConfig(data=4), 3, 2, "cuda_ipc", r"cuda_ipc: 3 servers × 2 ranks"),
        (ParallelConfig(data=128), 1, 8, "nccl", r"h100x128 has 16 nodes of 8 GPUs; this layout takes 17: 16 with 128"),
    ],
)
def test_what_cannot_be_placed_is_refused(parallel, servers, width, transport, message, cluster: ClusterConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        place(config(parallel, servers, width, transport), cluster)


@given(data=st.integers(1, 64), servers=st.integers(1, 12), width=st.integers(1, 8), size=st.integers(1, 8))
def test_no_gpu_is_given_twice_and_no_server_leaves_its_node(data: int, servers: int, width: int, size: int) -> None:
    cluster = load_cluster(CLUSTERS / "h100x128.yaml").model_copy(update={"gpus_per_node": size, "nodes": 1000})
    try:
        found = place(config(ParallelConfig(data=data), servers, width), cluster)
    except ConfigError:
        assert width > size or (data > size and data % size)
        return
    taken = [*found.trainer, *(device for engine in found.engines for device in engine)]
    assert len(set(taken)) == len(taken) == data + servers * width
    assert all(device.gpu < size for device in taken)
    assert all(len({device.node for device in engine}) == 1 for engine in found.engines)


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("h100*.yaml")), ids=lambda file: file.stem)
def test_shipped_clusters_are_valid(file: Path) -> None:
    assert load_cluster(file).name == file.stem


def test_a_wrong_cluster_file_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = (CLUSTERS / "h100x1.yaml").read_text()
    file.write_text(text.replace("link_gbs", "link_gb").replace("nodes: 1", "nodes: 0", 1).replace("storage_gbs: 2", ""))
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    for line in (r"gpu.link_gb: unknown key", "did you mean gpu.link_gbs?", "nodes: given 0; ", "storage_gbs: missing"):
        assert line in str(caught.value)


@given(data=st.integers(1, 8), tensor=st.sampled_from((1, 2)), servers=st.integers(1, 8), width=st.integers(1, 8))
def test_engines_that_share_gpus_share_them_with_trainer_ranks_and_not_with_each_other(
    data: int, tensor: int, servers: int, width: int
) -> None:
    eight, ranks = Slots("this machine", 1, 8), data * tensor
    try:
        found = place(config(ParallelConfig(tensor=tensor, data=data), servers, width, "cuda_ipc"), eight)
    except ConfigError:
        assert ranks > 8 or servers * width > ranks
        return
    taken = [device for engine in found.engines for device in engine]
    assert len(set(taken)) == len(taken) == servers * width
    assert set(taken) <= set(found.trainer)
    names = [f"GPU-{n}" for n in range(8)]
    each = [visible(engine, names).split(",") for engine in found.engines]
    assert sorted(itertools.chain.from_iterable(each)) == sorted(names[device.gpu] for device in taken)
    assert all(len(own) == width for own in each)


def test_more_parts_than_gpus_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"this machine has 1 nodes of 4 GPUs; this layout takes 2"):
        place_nodes(config(ParallelConfig(data=4), 1, 1), Slots("this machine", 1, 4))
