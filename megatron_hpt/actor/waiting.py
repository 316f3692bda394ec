"""What a trainer rank does while it waits for the coordinator: see to engines that died, and hear a notice."""

from __future__ import annotations

import itertools
import logging

from megatron_hpt.blackboard import NOTICE, Blackboard
from megatron_hpt.transfer.sender import WeightSender

logger = logging.getLogger(__name__)


class Waiting:
    """Collective: rank 0 decides what comes first, so that all ranks do the same.

    An engine that was started again is given the last published weights. One on the trainer's GPUs asks before it starts
    (``wanted/0``, answered by ``granted/0``): it measures what memory is free, so it may start while this waits, and the
    wait does not end before it is back.
    """

    def __init__(self, board: Blackboard, is_lead: bool, sender: WeightSender, seconds: float) -> None:
        """
        Args:
            seconds: longest wait for the next thing that comes.
        """
        self._board, self._is_lead, self._sender, self._seconds = board, is_lead, sender, seconds
        self._renewed = 0
        """Engines that were started again and have got their weights."""
        self._granted = 0
        """Engines that may start, or have."""

    def until(self, key: str, heeds_notice: bool = True) -> bool:
        """Wait for a key of the blackboard.

        Returns:
            False: a notice came first.
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
        decided = f"go/{key}/{turn}"
        if self._is_lead:
            keys = [f"returned/{self._renewed}"]
            if self._granted <= self._renewed:  # else one is starting
                keys += [f"wanted/{self._granted}", key]
            keys = [NOTICE, *keys] if heeds_notice else keys
            self._board.put(decided, self._board.wait_any(keys, self._seconds, "the coordinator"))
        return self._board.wait(decided, self._seconds, "rank 0")

    def _grant(self) -> None:
        if self._is_lead:
            self._board.put(f"granted/{self._granted}", True)
        self._granted += 1

    def _renew(self, url: str) -> None:
        logger.info("engine %s has been started again: it gets the last published weights", url)
        self._sender.renew(url)
        self._renewed += 1
