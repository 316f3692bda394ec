"""The typed description of a cluster that `plan` calculates with and launchers place processes on. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from megatron_hpt.config import PositiveFloat, PositiveInt, Section
from megatron_hpt.errors import ConfigError, did_you_mean

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
    if not path.is_file():
        raise ConfigError(f"--cluster: {path}: no such file; recipes/clusters/ has examples")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{path}: not a cluster", *map(_explain, error.errors())])) from None


def _explain(problem: Any) -> str:
    *section, last = map(str, problem["loc"] or ("the file",))
    key = ".".join([*section, last])
    if problem["type"] == "extra_forbidden":
        known = (GpuConfig if section == ["gpu"] else ClusterConfig).model_fields
        return f"{key}: unknown key; allowed: {', '.join(known)}{did_you_mean(last, known)}"
    what = "missing" if problem["type"] == "missing" else f"given {problem['input']!r}; {problem['msg'].lower()}"
    return f"{key}: {what}"
