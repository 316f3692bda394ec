"""Servers that die around a call, on real sockets."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from megatron_hpt.errors import DeadlineError, EngineGone
from megatron_hpt.transfer.calls import Calls


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does this with its listening socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def test_a_server_that_stops_listening_before_it_answers_is_gone_long_before_the_deadline() -> None:
    """As vLLM's when its engine dies under a call: it waits for the caller, before it ends."""
    ended = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        listener.close()
        while connection.recv(4096):
            pass
        ended.set()

    started = time.monotonic()
    with serving(serve) as url, pytest.raises(EngineGone, match=rf"{url} cannot be reached for /x: .* stopped listening"):
        Calls(url, 60.0).ask("POST", "/x", json={})
    assert time.monotonic() - started < 20
    assert ended.is_set()


@pytest.mark.slow
def test_one_that_is_busy_is_waited_for() -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        time.sleep(3.5)  # others that look are not accepted, but queue
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        connection.close()

    with serving(serve) as url:
        assert Calls(url, 60.0).ask("GET", "/x").json() == {}


def test_one_that_listens_and_does_not_answer_is_late() -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        while connection.recv(4096):
            pass

    with serving(serve) as url, pytest.raises(DeadlineError, match="did not answer /x within 2 s"):
        Calls(url, 2.0).ask("GET", "/x")


def test_one_that_breaks_the_connection_is_gone() -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.close()

    with serving(serve) as url, pytest.raises(EngineGone, match="cannot be reached for /x"):
        Calls(url, 60.0).ask("GET", "/x")
