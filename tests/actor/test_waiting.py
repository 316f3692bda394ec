"""Engines that die while trainer ranks wait, over a real blackboard; ranks are threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

from megatron_hpt.actor.waiting import Waiting
from megatron_hpt.blackboard import NOTICE, Blackboard


class Sender:
    """Notes who was given weights."""

    def __init__(self) -> None:
        self.renewed: list[str] = []

    def renew(self, url: str) -> None:
        self.renewed.append(url)


class Ranks:
    """Two ranks that wait alike."""

    def __init__(self) -> None:
        self.board = Blackboard.host()
        self.senders = [Sender(), Sender()]
        self._pool = ThreadPoolExecutor(2)
        self._ranks = [
            Waiting(Blackboard.join(self.board.address), rank == 0, sender, 20) for rank, sender in enumerate(self.senders)
        ]

    def wait(self, key: str, **how: bool) -> list:
        return [self._pool.submit(rank.until, key, **how) for rank in self._ranks]


def came(futures: list) -> list[bool]:
    return [future.result(10) for future in futures]


def test_a_wait_goes_on_until_an_engine_that_was_let_start_is_back() -> None:
    ranks = Ranks()
    waits = ranks.wait("batch/0")
    ranks.board.put("wanted/0", "http://a")
    assert ranks.board.wait("granted/0", 10, "rank 0")
    ranks.board.put("batch/0", True)
    ranks.board.put("wanted/1", "http://b")  # one after the other: it measures what is free
    threading.Event().wait(0.3)
    assert not any(wait.done() for wait in waits)
    assert ranks.board.get("granted/1") is None
    ranks.board.put("returned/0", "http://a")
    assert ranks.board.wait("granted/1", 10, "rank 0")
    ranks.board.put("returned/1", "http://b")
    assert came(waits) == [True, True]
    assert [sender.renewed for sender in ranks.senders] == [["http://a", "http://b"]] * 2


def test_one_that_asks_while_the_trainer_works_waits_for_the_next_wait() -> None:
    ranks = Ranks()
    ranks.board.put("batch/0", True)
    assert came(ranks.wait("batch/0")) == [True, True]
    ranks.board.put("wanted/0", "http://a")
    assert ranks.board.get("granted/0") is None
    waits = ranks.wait("batch/1")
    assert ranks.board.wait("granted/0", 10, "rank 0")
    ranks.board.put("returned/0", "http://a")
    ranks.board.put("batch/1", True)
    assert came(waits) == [True, True]


def test_one_that_shares_no_gpu_comes_back_without_asking_and_a_notice_comes_first() -> None:
    ranks = Ranks()
    ranks.board.put("returned/0", "http://a")
    ranks.board.put("batch/0", True)
    assert came(ranks.wait("batch/0")) == [True, True]
    assert ranks.senders[0].renewed == ["http://a"]
    ranks.board.put(NOTICE, True)
    ranks.board.put("batch/1", True)
    assert came(ranks.wait("batch/1")) == [False, False]
    ranks.board.put("evaluated", True)
    assert came(ranks.wait("evaluated", heeds_notice=False)) == [True, True]
