"""The typed description of a cluster that `plan` calculates with and launchers place processes on. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import ValidationError

from megatron_hpt.config import PositiveFloat, PositiveInt, Section
from megatron_hpt.errors import ConfigError, did_you_mean

S = TypeVar("S", bound=Section)
Precision = Literal["float32", "bfloat16", "fp8"]


class GpuConfig(Section):
    name: str
    """What it is called."""
    memory_gib: PositiveFloat
    """What a process can use of its memory, in GiB (an H100 of 80 GB shows 79.1)."""
    memory_gbs: PositiveFloat
    """Bandwidth of its memory, 10^9 bytes/s."""
    tflops: dict[Precision, PositiveFloat]
    """Peak of dense matrix products, 10^12 FLOP/s, by precision; one that is missing cannot be computed in."""
    link_gbs: PositiveFloat
    """To the other GPUs of the node (NVLink, else PCIe), one direction, 10^9 bytes/s."""
    host_gbs: PositiveFloat
    """To the host's memory (PCIe), one direction, 10^9 bytes/s."""


class ClusterConfig(Section):
    name: str
    """Shown in plans."""
    nodes: PositiveInt
    """Nodes that a run may take."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node; on a cluster without any, the ranks that a node runs."""
    gpu: GpuConfig
    """Every GPU."""
    host_memory_gib: PositiveFloat
    """Memory of a node's host, in GiB."""
    network_gbs: PositiveFloat
    """From one GPU to another node, one direction, 10^9 bytes/s (a port of 400 Gb/s: 50)."""
    storage_gbs: PositiveFloat
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
    return checked(ClusterConfig, read_tree(path), path)


def read_tree(path: Path) -> Any:
    """What a YAML file of a cluster says, unchecked.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    if not path.is_file():
        raise ConfigError(f"--cluster: {path}: no such file; recipes/clusters/ has examples")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None


def checked(kind: type[S], tree: Any, path: Path) -> S:
    """A section from what its file says.

    Raises:
        ConfigError: not one; one line for each problem.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError("\n  ".join([f"{path}: not a cluster", *lines])) from None


def _explain(kind: type[Section], problem: Any) -> str:
    *section, last = map(str, problem["loc"] or ("the file",))
    key = ".".join([*section, last])
    if problem["type"] == "extra_forbidden":
        known = _fields(kind, section)
        return f"{key}: unknown key; allowed: {', '.join(known)}{did_you_mean(last, known)}"
    if problem["type"] == "value_error":  # of the whole, in words of our own
        return str(problem["ctx"]["error"])
    what = "missing" if problem["type"] == "missing" else f"given {problem['input']!r}; {problem['msg'].lower()}"
    return f"{key}: {what}"


def _fields(kind: type[Section], section: Sequence[str]) -> dict[str, Any]:
    """The keys of a section of a section."""
    for name in section:
        annotation = kind.model_fields[name].annotation
        kind = next(
            each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, Section)
        )
    return kind.model_fields
