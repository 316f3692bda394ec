"""Servers that stop listening."""

import socket

import pytest

from megatron_hpt import listening
from megatron_hpt.listening import StoppedListening, refuses


def test_a_server_is_deaf_when_it_has_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(listening.time, "monotonic", lambda: now[0])
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    urls = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in servers]
    looking, found = StoppedListening(), []
    servers[1].close()
    for _ in range(10):
        now[0] += 1.0
        found.append(looking.among(urls))
    assert found.index([urls[1]]) == 6  # refused first at the first look, for more than five seconds at the seventh
    assert [urls[1] in each for each in found].count(True) == 1
    assert not refuses(urls[0])
    assert refuses(urls[1])
    servers[0].close()


def test_one_that_listens_again_was_not_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    now, refusing = [100.0], [True]
    monkeypatch.setattr(listening.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(listening, "refuses", lambda url: refusing[0])
    looking = StoppedListening()
    for second in range(20):
        now[0] += 1.0
        refusing[0] = second % 4 != 3
        assert looking.among(["http://a:1"]) == []


def test_a_server_that_takes_no_connection_may_be_busy() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        first = [socket.create_connection(address, timeout=1) for _ in range(1)]
        assert not refuses(f"http://127.0.0.1:{address[1]}", 0.2)
        for connection in first:
            connection.close()
