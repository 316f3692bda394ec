"""What a trainer rank does while it waits for the coordinator: it makes room for dead engines, and hears a notice.

Keys of the blackboard (n counts from 0 in the order of time):
    ``wanted/<n>`` (the supervisor's): an engine that shares the GPUs has died, and is to be started again.
    ``granted/<n>`` (rank 0's answer): the supervisor may start it, since this rank does not need the memory.
    ``returned/<n>`` (the supervisor's): URL of an engine that was started again and answers; it has no weights of ours yet.
    ``notice`` (the supervisor's): save and end.
    ``go/<key>/<turn>`` (rank 0's): which of all these came first while waiting for a key; the other ranks follow it.
"""

from __future__ import annotations

import itertools
import logging

from megatron_hpt.blackboard import NOTICE, Blackboard
from megatron_hpt.transfer.sender import WeightSender

logger = logging.getLogger(__name__)


class Waiting:
    """Waits for keys of the blackboard; collective: rank 0 decides what came first, so that all ranks do the same.

    An engine that was started again is given the last published weights. An engine on the trainer's GPUs measures how much
    memory is free when it starts. So it is granted its start only during a wait, and the wait does not end before it is back.
    """

    def __init__(self, board: Blackboard, is_lead: bool, sender: WeightSender, deadline_s: float) -> None:
        """
        Args:
            is_lead: whether this is rank 0.
            deadline_s: longest wait, in seconds, for each of the keys that come.
        """
        self._board, self._is_lead, self._sender, self._deadline_s = board, is_lead, sender, deadline_s
        self._renewed = 0
        """Engines that were started again and have got their weights."""
        self._granted = 0
        """Engines whose start was granted."""

    def until(self, key: str, heeds_notice: bool = True) -> bool:
        """Wait for a key, and meanwhile see to the engines that died.

        Returns:
            True when the key came, False when a notice came first.

        Raises:
            DeadlineError: nothing came in time.
        """
        for turn in itertools.count():
            came = self._what_came(key, turn, heeds_notice)
            if came.startswith("wanted/"):
                self._grant()
            elif came.startswith("returned/"):
                self._renew(self._board.get(came))
            else:
                return came == key

    def _what_came(self, key: str, turn: int, heeds_notice: bool) -> str:
        """Return the key that rank 0 found first; `turn` numbers the keys that came during one wait."""
        decision = f"go/{key}/{turn}"
        if self._is_lead:
            keys = [f"returned/{self._renewed}"]
            # An engine that was granted its start and is not back has the memory: neither another nor this rank may take it.
            if self._granted <= self._renewed:
                keys += [f"wanted/{self._granted}", key]
            keys = [NOTICE, *keys] if heeds_notice else keys
            self._board.put(decision, self._board.wait_any(keys, self._deadline_s, "the coordinator"))
        return self._board.wait(decision, self._deadline_s, "rank 0")

    def _grant(self) -> None:
        if self._is_lead:
            self._board.put(f"granted/{self._granted}", True)
        self._granted += 1

    def _renew(self, url: str) -> None:
        logger.info("engine %s has been started again: it gets the last published weights", url)
        self._sender.renew(url)
        self._renewed += 1
