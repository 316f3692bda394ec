"""What a plan is made for, beside the recipe: the cluster, and how long responses are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.rollouts.lengths import Lengths, of_fill, of_means
from megatron_hpt.run import open_run

DEFAULT_CLUSTER = Path(__file__).parents[2] / "recipes" / "clusters" / "h100x128.yaml"


@dataclass(frozen=True)
class Assumptions:
    """What a plan is made for, beside the recipe: the options of `megatron-hpt plan`."""

    cluster: Path | None = None
    """Cluster file; None: nodes of 8 H100."""
    nodes: int | None = None
    """Nodes of the cluster; None: those of its file, or as many as the recipe takes."""
    fill: float = 0.5
    """Mean length of prompts and responses as a share of their limits."""
    response_tokens: float | None = None
    """Mean length of responses; None: by `fill`."""
    run: Path | None = None
    """Run directory whose ledger has the lengths of prompts and responses; None: `fill` and `response_tokens` say them."""

    def cluster_of(self, config: Config) -> ClusterConfig:
        """Return the cluster; without a file and a number of nodes, one that the recipe and layouts near it fit.

        Raises:
            ConfigError: no such file, or none of a cluster.
        """
        if self.cluster is None and self.nodes is None:
            return _enough(config)
        cluster = load_cluster(self.cluster or DEFAULT_CLUSTER)
        return cluster if self.nodes is None else resized(cluster, self.nodes)

    def lengths_of(self, config: Config) -> Lengths:
        """Return the lengths of a step's prompts and responses.

        Raises:
            ConfigError: lengths that the recipe does not allow, or a run without any.
        """
        if self.run is not None:
            from megatron_hpt.plan.rollouts.ledger_lengths import of_ledger  # brings pyarrow

            return of_ledger(open_run(self.run))
        if self.response_tokens is None:
            return of_fill(config, self.fill)
        limit, prompt = config.data.max_response_length, self.fill * config.data.max_prompt_length
        if self.response_tokens > limit:
            raise ConfigError(
                f"--response-tokens: given {self.response_tokens:g}; responses have {limit} at most (data.max_response_length)"
            )
        return of_means(prompt, self.response_tokens, limit, f"{self.response_tokens:,.0f} tokens a response on average")


def _enough(config: Config) -> ClusterConfig:
    """Nodes of 8 H100: four times what the recipe takes, so that a layout that does not fit finds one that does."""
    plenty = load_cluster(DEFAULT_CLUSTER).model_copy(update={"name": "as many nodes as it takes"})
    devices = config.parallel.ranks + config.rollout.servers * config.rollout.tensor_parallel
    return plenty.model_copy(update={"nodes": 4 * (devices // plenty.gpus_per_node + 2)})


def resized(cluster: ClusterConfig, nodes: int) -> ClusterConfig:
    """Return a cluster with another number of nodes."""
    few = f"{nodes} node{'s' if nodes > 1 else ''} of {cluster.name}"
    name = cluster.name if nodes == cluster.nodes else few
    return cluster.model_copy(update={"nodes": nodes, "name": name})
