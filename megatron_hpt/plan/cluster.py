"""The typed description of a cluster that `plan` calculates with and launchers place processes on. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from megatron_hpt.errors import ConfigError
from megatron_hpt.overrides import read_yaml
from megatron_hpt.settings.sections import Float, Int, Name, Processes, Section, validated_section

S = TypeVar("S", bound=Section)
Precision = Literal["float32", "bfloat16", "fp8"]
Speed = Annotated[Float, Field(ge=1e-3, le=1e6)]
"""10^9 bytes/s, or 10^12 FLOP/s."""
Gibibytes = Annotated[Float, Field(gt=0, le=2**20)]
GpusOfNode = Annotated[Int, Field(gt=0, le=1024)]


class GpuConfig(Section):
    name: Name
    """What it is called."""
    memory_gib: Gibibytes
    """What a process can use of its memory, in GiB (an H100 of 80 GB shows 79.1)."""
    memory_gbs: Speed
    """Bandwidth of its memory, 10^9 bytes/s."""
    tflops: dict[Precision, Speed]
    """Peak of dense matrix products, 10^12 FLOP/s, by precision; one that is missing cannot be computed in."""
    link_gbs: Speed
    """To the other GPUs of the node (NVLink, else PCIe), one direction, 10^9 bytes/s."""
    host_gbs: Speed
    """To the host's memory (PCIe), one direction, 10^9 bytes/s."""
    multiprocessors: Annotated[Int, Field(gt=0, le=4096)] = 132
    """Parts that compute tiles of matrix products side by side (an H100 SXM has 132)."""


class ClusterConfig(Section):
    called: ClassVar[str] = "a cluster"
    name: Name
    """Shown in plans."""
    nodes: Processes
    """Nodes that a run may take."""
    gpus_per_node: GpusOfNode = 8
    """GPUs of a node; on a cluster without any, the ranks that a node runs."""
    gpu: GpuConfig
    """Every GPU."""
    host_memory_gib: Gibibytes
    """Memory of a node's host, in GiB."""
    network_gbs: Speed
    """From one GPU to another node, one direction, 10^9 bytes/s (a port of 400 Gb/s: 50)."""
    storage_gbs: Speed
    """What the whole run writes to the shared file system, 10^9 bytes/s."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file (recipes/clusters/).

    Raises:
        ConfigError: no such file, not YAML, or not a cluster; one line for each problem.
    """
    tree = read_tree(path)
    if isinstance(tree, dict) and "kind" in tree:
        raise ConfigError(
            f"{path}: not a cluster to plan for: it says where recipes are sent (kind: {tree['kind']}), which is for "
            "`megatron-hpt launch --site`; a plan needs the hardware, as recipes/clusters/h100x8.yaml describes it "
            f"({', '.join(ClusterConfig.model_fields)})"
        )
    return validated_section(ClusterConfig, tree, str(path), "not a cluster")


def read_tree(path: Path, option: str = "--cluster") -> Any:
    """Read the YAML file of a cluster or a site, without checking what it says.

    Args:
        option: of the command line, which names the file. Examples lie in recipes/clusters/ or recipes/sites/.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    if not path.is_file():
        raise ConfigError(f"{option}: {path}: no such file; recipes/{option[2:]}s/ has examples")
    return read_yaml(path)
