"""What a row is for. Imports no torch."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """What a row is for; a term of the loss applies to some roles."""

    ROLLOUT = 0
    """The policy's own answer."""
    DEMONSTRATION = 1
    """A demonstration that the gate chose to imitate."""
    OFF_POLICY = 2
    """A demonstration that the gate chose to train by off-policy RL (the band between two thresholds)."""
