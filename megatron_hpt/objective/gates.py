"""From the recipe's gate to the gate object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megatron_hpt.config import GateConfig, Schedule
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.gate import Choice, Gate, Soft, Switch, Thresholds
from megatron_hpt.settings.user_functions import import_function

_GRID = [k / 64 for k in range(65)]
"""Where a schedule is checked to be monotone."""


def hybrid(config: GateConfig) -> Gate:
    """The gate of algorithms that have both sides.

    Raises:
        ConfigError: thresholds in the wrong order, a schedule that is not monotone or cannot be imported.
    """
    without = without_demonstration(config)
    if config.soft:
        rollouts = schedule(config.rollout_schedule, "algorithm.gate.rollout_schedule", rising=True)
        demonstration = schedule(config.demonstration_schedule, "algorithm.gate.demonstration_schedule", rising=False)
        given = (
            f"α = f(P) = {config.rollout_schedule} on rollouts, β = g(P) = {config.demonstration_schedule} on the demonstration"
        )
        return Soft(rollouts, demonstration, without, given)
    by_source = {
        name: _thresholds(c, config.strict, f"algorithm.gate.by_source.{name}") for name, c in config.by_source.items()
    }
    return Switch(_thresholds(config, config.strict, "algorithm.gate"), without, by_source, config.hysteresis)


def without_demonstration(config: GateConfig) -> Choice:
    """What a prompt does whose demonstration is wanted and missing."""
    return Choice.ROLLOUTS if config.missing_demonstration == "rollouts" else Choice.SKIPPED


def _thresholds(config, strict: bool, key: str) -> Thresholds:
    low, high = config.threshold, config.off_policy_threshold
    if high is not None and isinstance(low, int) == isinstance(high, int) and high < low:
        raise ConfigError(f"{key}.off_policy_threshold: given {high}, below the threshold {low}; the band would be empty")
    return Thresholds(low, high, strict)


def schedule(given: Schedule, key: str, rising: bool) -> Callable[[float], float]:
    """A monotone, non-negative function of the share solved.

    Raises:
        ConfigError: it is not, or cannot be had.
    """
    function = _table(given, key) if isinstance(given, list) else _named(given, key)
    try:
        values = [float(function(share)) for share in _GRID]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {given!r} gives no number for a share solved: {error}") from None
    if any(value < 0 for value in values):
        raise ConfigError(f"{key}: {given!r} gives {min(values):g} somewhere; factors must not be negative")
    if any((after < before) if rising else (after > before) for before, after in pairwise(values)):
        raise ConfigError(f"{key}: {given!r} must not {'fall' if rising else 'rise'} with the share solved")
    return function


@dataclass(frozen=True)
class Table:
    """Factors at equal distances over P = 0 … 1, linear between them; n + 1 of them say what each count of n gets."""

    factors: tuple[float, ...]

    def __call__(self, share: float) -> float:
        """The factor of a share."""
        place = share * (len(self.factors) - 1)
        left = min(int(place), len(self.factors) - 2)
        return self.factors[left] + (place - left) * (self.factors[left + 1] - self.factors[left])


_NAMED: dict[str, Callable[[float], float]] = {"up": Table((0.0, 1.0)), "down": Table((1.0, 0.0))}


def _named(given: str, key: str) -> Callable[[float], float]:
    if ":" in given:
        return import_function(given, key)
    if given not in _NAMED:
        raise ConfigError(f"{key}: given {given!r}; allowed: {', '.join(_NAMED)}, a list of factors, or module:function")
    return _NAMED[given]


def _table(factors: list[float], key: str) -> Table:
    if len(factors) < 2:
        raise ConfigError(f"{key}: given {factors!r}; a table needs at least two factors, for P = 0 and P = 1")
    return Table(tuple(factors))
