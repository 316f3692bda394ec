"""Checkpoints both ways: bit for bit over random models and layouts, refused before anything is written, continued."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import CheckpointError, ModelError
from megatron_hpt.examples.tiny_families import MODELS
from megatron_hpt.models.checkpoint_layout import chunks_by_rank
from megatron_hpt.models.conversion import ToHf, ToMegatron, compare
from megatron_hpt.models.hf_config import SUPPORTED, model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes
from tests import programs
from tests.ranks import run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"
SPARSE = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


@dataclass
class Drawn:
    """A random model and a layout that divides it."""

    config: dict[str, Any]
    layout: ParallelConfig
    dtype: torch.dtype
    dtype_key: str | None = "dtype"


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    family, tensor = draw(st.sampled_from(SUPPORTED)), draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n % tensor == 0 or tensor % n == 0]))
    pipeline, pieces = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": draw(st.sampled_from([4, 6])),
        "num_attention_heads": tensor * kv_heads * draw(st.integers(1, 2)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8])) * tensor,
        "num_hidden_layers": pipeline * pieces * draw(st.integers(1, 2)),
        "intermediate_size": tensor * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 17)),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    }
    expert = 1
    if family in SPARSE:
        expert = draw(st.sampled_from([1, 2]))
        config |= {SPARSE[family]: expert * draw(st.integers(1, 2)) * 2, "num_experts_per_tok": 2}
        config |= {"moe_intermediate_size": config["intermediate_size"]} if family == "qwen3_moe" else {}
    layout = ParallelConfig(
        tensor=tensor, pipeline=pipeline, virtual_pipeline=pieces, expert=expert, data=expert, sequence=tensor > 1
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Drawn(config, layout, dtype, draw(st.sampled_from(["dtype", "torch_dtype", None])))


def write_model(folder: Path, drawn: Drawn, files: int = 1) -> None:
    """A folder with random bits for weights (also infinities and NaN: nothing computes with them)."""
    folder.mkdir()
    known = {drawn.dtype_key: str(drawn.dtype).removeprefix("torch.")} if drawn.dtype_key else {}
    (folder / "config.json").write_text(json.dumps({**drawn.config, **known}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("carried over")
    tensors = {}
    for name, sizes in hf_tensor_shapes(model_shape(folder)).items():
        bits = torch.randint(-(2**15), 2**15, (*sizes, drawn.dtype.itemsize // 2), dtype=torch.int16)
        tensors[name] = bits.view(drawn.dtype).reshape(sizes)
    names = [*tensors]
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor, with its type and shape."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
    return found


def side_files(folder: Path) -> dict[str, Any]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".safetensors" not in path.name]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models(), st.sampled_from([1, 3]), st.sampled_from(["5GB", 300]))
def test_there_and_back_is_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, files: int, shard: Any) -> None:
    folder = tmp_path_factory.mktemp("round_trip")
    write_model(folder / "hf", drawn, files)
    ToMegatron(folder / "hf", drawn.layout, None).write(folder / "megatron")
    ToHf(folder / "megatron", shard).write(folder / "back")
    assert digests(folder / "back") == digests(folder / "hf")
    assert side_files(folder / "back") == side_files(folder / "hf")
    size, tensors = compare(folder / "hf", folder / "megatron")
    assert all(tensor.hf == tensor.megatron for tensor in tensors)
    assert size.nbytes == sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors")) - headers(folder / "hf")
    index = folder / "back" / "model.safetensors.index.json"
    assert index.is_file() is (len([*(folder / "back").glob("*.safetensors")]) > 1)
    shutil.rmtree(folder)


def headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


LLAMA = Drawn(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "vocab_size": 33,
        "max_position_embeddings": 64,
    },
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
    torch.bfloat16,
)


def test_the_type_of_the_weights_can_be_changed(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)
    tensors = {name: torch.randn(t.shape) for name, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    ToMegatron(tmp_path / "hf", LLAMA.layout, torch.bfloat16).write(tmp_path / "megatron")
    ToHf(tmp_path / "megatron").write(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].bfloat16()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.input_layernorm\.weight is of type BF16, other tensors of .* F32.*--dtype"
    ):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def without(name: str):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def with_tensor(name: str, *sizes: int, dtype: torch.dtype = torch.bfloat16):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: torch.zeros(sizes, dtype=dtype)}, folder / "model.safetensors")

    return change


def both(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def strange_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}}))


def with_config(**keys: Any):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    return change


def twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    weight_map = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def gone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


REFUSED = {
    "cut short": (cut_short, "not a whole safetensors file"),
    "a missing tensor": (
        without("model.layers.1.mlp.up_proj.weight"),
        r"missing tensors \['model.layers.1.mlp.up_proj.weight'\]",
    ),
    "a tensor too many": (with_tensor("model.mystery", 3), r"unexpected tensors \['model.mystery'\]"),
    "a wrong shape": (
        with_tensor("model.norm.weight", 31),
        r"model.norm.weight has shape \(31,\), config.json implies \(32,\)",
    ),
    "a strange type": (with_tensor("model.norm.weight", 32, dtype=torch.int8), "model.norm.weight is of type I8"),
    "an unknown architecture": (with_config(model_type="mamba"), "model_type 'mamba' is not supported"),
    "an unknown key": (with_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    "quantised weights": (with_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "a single file beside an index": (both, "has model.safetensors and model.safetensors.index.json, which does not name it"),
    "an index that is none": (strange_index, "not an index of safetensors files"),
    "a text for a mapping": (with_config(rope_scaling="yarn"), "a value is of another kind than its key has"),
    "a text for a flag": (with_config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or false"),
    "a tensor twice": (twice, "is also in model.safetensors"),
    "a file that the index names": (gone, "names files that are not there: model-2.safetensors"),
    "another format": (as_bin, r"no \*.safetensors files .*there is pytorch_model.bin: save it with transformers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    write_model(tmp_path / "hf", LLAMA)
    damage, message = REFUSED[case]
    damage(tmp_path / "hf")
    with pytest.raises(ModelError, match=message):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", LLAMA)
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    return tmp_path / "megatron"


def test_damaged_checkpoints_are_refused(tmp_path: Path, megatron: Path) -> None:
    whole = {path: path.read_bytes() for path in megatron.glob("*.distcp")}
    path = next(iter(whole))
    path.write_bytes(whole[path][:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} has .* bytes, .* were written"):
        ToHf(megatron)
    (megatron / "megatron_hpt.json").unlink()  # a checkpoint of another program has none
    with pytest.raises(CheckpointError, match=f"{path.name}: truncated"):
        ToHf(megatron)
    path.write_bytes(whole[path])
    shutil.move(megatron / "hf", tmp_path / "side")
    with pytest.raises(CheckpointError, match="give --like"):
        ToHf(megatron)
    ToHf(megatron, like=tmp_path / "hf").write(tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")
    with_config(num_hidden_layers=5)(tmp_path / "side")
    with pytest.raises(CheckpointError, match=r"has shape \(4, .*config.json implies \(5, "):
        ToHf(megatron, like=tmp_path / "side")
    (megatron / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint in Megatron's distributed format"):
        ToHf(megatron, like=tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back", "side"}


def test_damage_inside_a_checkpoint_is_told(tmp_path: Path, megatron: Path) -> None:
    """Right sizes, wrong bytes. Of another program's, without checksums: what holds a tensor together is an error, its values
    are for `verify` to tell."""
    part = next(megatron.glob("*.distcp"))
    whole = part.read_bytes()
    part.write_bytes(bytes(1000) + whole[1000:])
    with pytest.raises(CheckpointError, match=rf"{part.name}: bytes 0 to .* are not what was written"):
        ToHf(megatron).write(tmp_path / "back")
    (megatron / "megatron_hpt.json").unlink()
    with pytest.raises(CheckpointError, match=rf"cannot be read from .*{part.name}.*: damaged"):
        ToHf(megatron).write(tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def test_a_folder_of_links_that_nobody_may_write(tmp_path: Path) -> None:
    """As Hugging Face's cache has it: links to blobs; what is made of it is plain files."""
    write_model(tmp_path / "hf", LLAMA)
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in (tmp_path / "hf").iterdir():
        (cache / path.name).symlink_to(path)
    (tmp_path / "hf" / "config.json").chmod(0o444)
    cache.chmod(0o555)
    ToMegatron(cache, LLAMA.layout, torch.float32).write(tmp_path / "megatron")
    side = tmp_path / "megatron" / "hf"
    assert not any(path.is_symlink() for path in side.rglob("*"))
    assert side.stat().st_mode & 0o200
    assert (side / "config.json").stat().st_mode & 0o200
    assert json.loads((side / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_two_that_write_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)
    job = ToMegatron(tmp_path / "hf", LLAMA.layout, None)
    errors = []

    def another(_: int) -> None:
        if not errors:
            with pytest.raises(BlockingIOError, match=r"another process is writing .*megatron") as found:
                job.write(tmp_path / "megatron")
            errors.append(found)

    job.write(tmp_path / "megatron", another)
    assert errors
    assert all(tensor.hf == tensor.megatron for tensor in compare(tmp_path / "hf", tmp_path / "megatron")[1])


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)
    tensors = {name: torch.ones(t.shape) for name, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e6
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight has numbers beyond what torch\.float16"):
        ToMegatron(tmp_path / "hf", LLAMA.layout, torch.float16).write(tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_copy_of_the_embedding_as_output_layer(tmp_path: Path) -> None:
    """As some tied models are published; transformers ignores it."""
    write_model(tmp_path / "hf", Drawn({**LLAMA.config, "tie_word_embeddings": True}, LLAMA.layout, torch.bfloat16))
    expected = digests(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    ToHf(tmp_path / "megatron").write(tmp_path / "back")
    assert digests(tmp_path / "back") == expected
    tensors["lm_head.weight"][0, 0] = 1.0
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight is not the embedding"):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None)


def test_what_is_given_is_what_it_should_be(tmp_path: Path, megatron: Path) -> None:
    with pytest.raises(ModelError, match=r"lies in .*hf, which is what is converted"):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "hf" / "megatron")
    with pytest.raises(ModelError, match="is a checkpoint in Megatron's format already"):
        ToMegatron(megatron, LLAMA.layout, None)
    with pytest.raises(CheckpointError, match="it is a Hugging Face folder"):
        ToHf(tmp_path / "hf", like=tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"has its own configuration in hf/: leave --like out"):
        ToHf(megatron, like=tmp_path / "hf")
    with_config(rope_theta=5.0)(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is of another model than"):
        compare(tmp_path / "hf", megatron)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="link exists; give a new folder"):
        ToHf(megatron).write(tmp_path / "link")
    for damage in (b"[]", b"null", b"{"):
        (megatron / "megatron_hpt.json").write_bytes(damage)
        with pytest.raises(CheckpointError):
            ToHf(megatron)


def test_a_changed_bit_is_found(tmp_path: Path, megatron: Path) -> None:
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.3.self_attn.k_proj.weight"].view(torch.int16)[5, 7] ^= 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    _, compared = compare(tmp_path / "hf", megatron)
    assert [tensor.name for tensor in compared if tensor.hf != tensor.megatron] == ["model.layers.3.self_attn.k_proj.weight"]


class Interrupted(BaseException):
    """As a signal would: no error of the conversion."""


def stop_after(count: int):
    calls = iter(range(count))

    def advance(_: int) -> None:
        if next(calls, None) is None:
            raise Interrupted

    return advance


def test_interrupted_work_goes_on_where_it_was(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA, files=2)
    job = ToMegatron(tmp_path / "hf", LLAMA.layout, None)
    with pytest.raises(Interrupted):
        job.write(tmp_path / "megatron", stop_after(40))
    partial = tmp_path / ".megatron.partial"
    done = {
        path.name: path.stat().st_mtime_ns
        for path in partial.glob("*.distcp")
        if (partial / ".written" / path.name[2]).is_file()
    }
    assert done
    assert not (tmp_path / "megatron").exists()
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    assert {name: (tmp_path / "megatron" / name).stat().st_mtime_ns for name in done} == done

    with pytest.raises(Interrupted):
        ToHf(tmp_path / "megatron", 4000).write(tmp_path / "back", stop_after(30))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".back.partial").glob("model*.safetensors")}
    assert done
    assert not (tmp_path / "back").exists()
    ToHf(tmp_path / "megatron", 4000).write(tmp_path / "back")
    assert {name: (tmp_path / "back" / name).stat().st_mtime_ns for name in done} == done
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back"}


def test_another_shard_size_or_shape_is_another_job(tmp_path: Path) -> None:
    """File names alone would be the same."""
    write_model(tmp_path / "hf", LLAMA)
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    with pytest.raises(Interrupted):
        ToHf(tmp_path / "megatron", 20_000).write(tmp_path / "back", stop_after(30))
    before = [path.name for path in (tmp_path / ".back.partial").glob("model*")]
    job = ToHf(tmp_path / "megatron", 21_000)
    assert set(before) & {*job._shards}
    job.write(tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    with pytest.raises(Interrupted):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "other", stop_after(40))
    with_config(**heads)(tmp_path / "hf")  # the same tensors, interleaved otherwise
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "other")
    assert all(tensor.hf == tensor.megatron for tensor in compare(tmp_path / "hf", tmp_path / "other")[1])


def test_a_kill_while_a_note_is_written_does_no_harm(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)
    with pytest.raises(Interrupted):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron", stop_after(40))
    (tmp_path / ".megatron.partial" / ".written" / ".3.12345").write_bytes(b"cut off")
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    assert not (tmp_path / "megatron" / ".written").exists()


def test_another_job_does_not_go_on_with_what_is_there(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)
    with pytest.raises(Interrupted):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron", stop_after(40))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")
    assert all(tensor.hf == tensor.megatron for tensor in compare(tmp_path / "hf", tmp_path / "megatron")[1])
    with pytest.raises(ModelError, match="megatron exists; give a new folder"):
        ToMegatron(tmp_path / "hf", LLAMA.layout, None).write(tmp_path / "megatron")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """Seen before the first byte; when others fill it meanwhile, nothing half-written stays."""
    drawn = Drawn({**LLAMA.config, "hidden_size": 256, "head_dim": 64}, LLAMA.layout, torch.bfloat16)
    write_model(tmp_path / "large", Drawn({**drawn.config, "vocab_size": 1500}, drawn.layout, drawn.dtype))
    job = ToMegatron(tmp_path / "large", LLAMA.layout, None)
    assert job.size().nbytes > 2**20
    with pytest.raises(ModelError, match=r"GB are to be written, .* GB are free"):
        job.write(small_disk / "megatron")
    assert not [*small_disk.iterdir()]

    small = Drawn({**LLAMA.config, "hidden_size": 128}, LLAMA.layout, torch.bfloat16)
    write_model(tmp_path / "small", small)
    job = ToMegatron(tmp_path / "small", LLAMA.layout, None)
    assert job.size().nbytes < 2**20

    def others(_: int) -> None:
        with (small_disk / "others").open("ab") as file:
            file.write(bytes(max(0, shutil.disk_usage(small_disk).free - 4096)))

    with pytest.raises(OSError, match="No space left"):
        job.write(small_disk / "megatron", others)
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def command(*arguments: Any) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


LARGE = Drawn(
    {**LLAMA.config, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 16},
    ParallelConfig(),
    torch.bfloat16,
)
"""About 0.5 GB."""


@pytest.mark.slow
def test_a_killed_conversion_goes_on_in_another_process_and_takes_little_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LARGE, files=8)
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    base = peak_memory(command("to-megatron", tmp_path / "hf", tmp_path / "megatron", "--dry-run"))
    process = subprocess.Popen(command("to-megatron", tmp_path / "hf", tmp_path / "megatron"))
    deadline = time.monotonic() + 120
    while not [*(tmp_path / ".megatron.partial").glob(".written/*")] and process.poll() is None:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "megatron").exists()
    forth = peak_memory(command("to-megatron", tmp_path / "hf", tmp_path / "megatron"))
    back = peak_memory(command("to-hf", tmp_path / "megatron", tmp_path / "back", "--shard-size", largest))
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")
    assert max(forth, back) - base < 3 * largest, (forth, back, base, largest)


LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process's largest resident memory begins with that of the one that starts it, so a small one does."""


def peak_memory(arguments: list[str]) -> int:
    """Largest resident memory of a process in bytes, mapped files included."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_the_tool_says_what_it_does_and_refuses_layouts(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", LLAMA)

    def tool(*arguments: Any, ok: bool = True) -> str:
        done = programs.tool("convert_hf.py", *arguments)
        assert (done.returncode == 0) is ok, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert "would be written: 4 files" in tool(
        "to-megatron", tmp_path / "hf", tmp_path / "m", "--tp", 2, "--pp", 2, "--dry-run"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    assert "allowed: 1, 2, 4" in tool("to-megatron", tmp_path / "hf", tmp_path / "m", "--pp", 3, ok=False)
    assert "allowed: fp32, bf16, fp16" in tool("to-megatron", tmp_path / "hf", tmp_path / "m", "--dtype", "fp8", ok=False)
    assert "leave both out" in tool("to-megatron", tmp_path / "hf", tmp_path / "m", "--ep", 2, ok=False)
    assert "wrote" in tool("to-megatron", tmp_path / "hf", tmp_path / "m", "--tp", 2)
    assert "names, shapes and checksums are equal" in tool("verify", tmp_path / "hf", tmp_path / "m")
    assert "shard size" in tool("to-hf", tmp_path / "m", tmp_path / "back", "--shard-size", "much", ok=False)
    without("model.norm.weight")(tmp_path / "hf")
    assert "missing tensors" in tool("verify", tmp_path / "hf", tmp_path / "m", ok=False)
    assert "query groups cut" in tool("show", tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m"}


LAYOUTS = {
    "one rank": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor=2, sequence=True),
    "stages 2 x pieces 2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tensor 4, more than key/value heads": ParallelConfig(tensor=4, sequence=True),
    "tensor 2 x expert 2": ParallelConfig(tensor=2, data=2, expert=2, sequence=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_reads_what_is_converted_and_writes_what_can_be(tmp_path: Path, layout: str) -> None:
    """Converted for another layout than it is loaded in; Megatron's own file has the chunks that are planned here."""
    chosen, models = LAYOUTS[layout], []
    for number, (name, write) in enumerate(MODELS.items()):
        if chosen.expert == 1 or name.startswith(("mixtral", "qwen3_moe")):
            models.append(tmp_path / f"model_{number}")
            write(models[-1])
            ToMegatron(models[-1], ParallelConfig(tensor=2, pipeline=2), None).write(models[-1].with_suffix(".megatron"))
    (tmp_path / "layout.json").write_text(json.dumps(chosen.model_dump()))
    run_ranks(Path(__file__).with_name("converted.py"), tmp_path / "layout.json", *models, ranks=chosen.ranks)
    for folder in models:
        own = folder.with_suffix(".own")
        shape = model_shape(folder)
        planned = {(c.stored.key, c.sizes, c.offset, c.extent) for rank in chunks_by_rank(shape, chosen) for c in rank}
        assert written_chunks(own) == planned
        ToHf(own).write(folder.with_suffix(".back"))
        assert digests(folder.with_suffix(".back")) == digests(folder)
        assert side_files(folder.with_suffix(".back")) == side_files(folder)


def written_chunks(checkpoint: Path) -> set[tuple]:
    metadata = FileSystemReader(checkpoint).read_metadata()
    return {
        (key, tuple(entry.size), tuple(chunk.offsets), tuple(chunk.sizes))
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
        for chunk in entry.chunks
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_comes_back(tmp_path: Path, name: str) -> None:
    MODELS[name](tmp_path / "hf")
    ToMegatron(tmp_path / "hf", ParallelConfig(pipeline=2), None).write(tmp_path / "megatron")
    ToHf(tmp_path / "megatron", "100KB").write(tmp_path / "back")
    ours, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()
        == AutoTokenizer.from_pretrained(tmp_path / "hf").get_vocab()
    )
