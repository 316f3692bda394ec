"""The keys that processes share."""

import time

import psutil
import pytest

from megatron_hpt.blackboard import Blackboard
from megatron_hpt.errors import DeadlineError


def test_values_and_deadlines() -> None:
    host = Blackboard.host()
    guest = Blackboard.join(host.address)
    assert guest.get("a") is None
    host.put("a", {"b": [1, None]})
    assert guest.wait("a", 5, "the host") == {"b": [1, None]}
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="the trainer is late: 'c' did not come within 1 s"):
        guest.wait("c", 1, "the trainer")
    assert time.monotonic() - started < 10


def test_it_listens_on_loopback_only() -> None:
    host = Blackboard.host()
    port = int(host.address.rsplit(":", 1)[1])
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
