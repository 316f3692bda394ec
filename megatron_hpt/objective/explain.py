"""The table and its rows in words and formulas, read off the records themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, ModelConfig
from megatron_hpt.objective.algorithm import Algorithm, Term
from megatron_hpt.objective.algorithms import ALGORITHMS, lookup, of_run
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Identity
from megatron_hpt.overrides import apply_overrides

_ROLES = {Role.ROLLOUT: "rollouts", Role.DEMONSTRATION: "demonstrations", Role.OFF_POLICY: "demonstrations in the band"}


@dataclass(frozen=True)
class TableLine:
    """One term of one algorithm."""

    algorithm: str
    """Empty on further terms of the same algorithm."""
    rows: str
    mask: str
    reference: str
    advantage: str
    shaping: str
    aggregation: str
    gate: str


def table_lines(name: str, algorithm: Algorithm) -> list[TableLine]:
    """The four components of every term, its aggregation and the gate."""
    lines = []
    for index, term in enumerate(algorithm.terms):
        first = index == 0
        lines.append(
            TableLine(
                name if first else "",
                roles_of(term),
                mask_of(term),
                term.reference.symbol,
                term.advantage.formula,
                "-" if isinstance(term.shaping, Identity) else term.shaping.formula,
                aggregation_of(term),
                algorithm.gate.formula if first else "",
            )
        )
    return lines


def roles_of(term: Term) -> str:
    """Which rows a term applies to."""
    return ", ".join(_ROLES[role] for role in sorted(term.roles))


def mask_of(term: Term) -> str:
    """Stability mask and mismatch correction."""
    return " × ".join(part for part in (term.stability.formula, term.correction.formula) if part)


def aggregation_of(term: Term) -> str:
    """Weight of a token, and whose tokens are counted where they are not the term's own."""
    counted = ", ".join(_ROLES[role] for role in sorted(term.counted))
    return term.aggregation.formula + (f" over {counted}" if term.counted != term.roles else "")


def print_table(console: Console) -> None:
    """All rows, with the settings that a recipe has by default."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_lines=False)
    for title in ("algorithm", "rows", "mask", "π_ref", "advantage Â", "shaping f", "weight of a token", "gate"):
        table.add_column(title, overflow="fold", no_wrap=title in ("algorithm", "rows"))
    for name in ALGORITHMS:
        for line in table_lines(name, _default(name, [])):
            table.add_row(*map(escape, astuple(line)))
    console.print(table)
    console.print("N tokens, S rows, |y| the row's own length; megatron-hpt algorithms NAME explains one", highlight=False)


def _default(name: str, overrides: Sequence[str]) -> Algorithm:
    """A row as the quickest of recipes would have it."""
    config = Config(
        name="explained", model=ModelConfig(path="-"), data=DataConfig(train="-"), algorithm=AlgorithmConfig(name=name)
    )
    return of_run(apply_overrides(config, [f"algorithm.{override}" for override in overrides]))


def explain(name: str, overrides: Sequence[str]) -> str:
    """One algorithm with its formula: what its gate does, every term, and what is around the loss.

    Args:
        overrides: settings below ``algorithm``, e.g. ``gate.threshold=2``.

    Raises:
        ConfigError: no such row, or a setting that cannot be.
    """
    algorithm = _default(name, overrides)
    about = inspect.getdoc(lookup(name))
    parts = [name, *([about] if about else []), "", f"gate   {algorithm.gate.formula}", "", f"loss   L = {_sum(algorithm)}"]
    for term in algorithm.terms:
        parts += ["", *_term(term)]
    parts += ["", *_around(algorithm)]
    return "\n".join(parts).rstrip() + "\n"


def _sum(algorithm: Algorithm) -> str:
    terms = [f"{'' if term.coefficient == 1 else f'{term.coefficient:g}·'}L_{term.name}" for term in algorithm.terms]
    if algorithm.entropy.coefficient:
        terms.append(f"(-{algorithm.entropy.coefficient:g}·H)")
    if algorithm.kl is not None and not algorithm.kl.in_reward:
        terms.append(f"{algorithm.kl.coefficient:g}·KL")
    return " + ".join(terms)


def _term(term: Term) -> list[str]:
    surrogate = term.stability.surrogate or term.reference.surrogate
    if isinstance(term.shaping, Identity):
        surrogate = surrogate.replace("f(", "(")
    lines = [
        f"L_{term.name} = -Σ_{{{roles_of(term)}}} Σ_t  w · mask · Â · {surrogate} · {term.aggregation.formula}",
        f"    π_ref      {term.reference.symbol}",
        f"    mask       {mask_of(term)}",
        f"    Â          {term.advantage.formula}",
        f"    shaping    f(x) = {term.shaping.formula}",
        f"    weighing   {aggregation_of(term)}   (N tokens, S rows, |y| the row's length; w the gate's factor of the row)",
    ]
    return lines


def _around(algorithm: Algorithm) -> list[str]:
    lines = []
    entropy = algorithm.entropy
    if entropy.coefficient:
        over = "all trained tokens" if entropy.demonstrations else "rollout tokens"
        adaptive = f", adaptive: · exp({entropy.rate:g}·({entropy.target:g} - H)) a step" if entropy.target is not None else ""
        lines.append(f"H      mean entropy of {over}, coefficient {entropy.coefficient:g}{adaptive}")
    if algorithm.kl is not None:
        place = "subtracted from rewards" if algorithm.kl.in_reward else "in the loss"
        kl = algorithm.kl
        lines.append(
            f"KL     mean of {kl.estimator.formula}, d = log π_θ - log π_reference, {place}, coefficient {kl.coefficient:g}"
        )
    return lines
