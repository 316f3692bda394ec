"""Ports of engines."""

import socket
from pathlib import Path

from megatron_hpt.launch.launchers import free_port


def test_an_engines_port_is_free_and_not_one_that_a_request_may_take() -> None:
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    for _ in range(20):
        port = free_port("127.0.0.1")
        assert 1024 < port < max(first_outgoing, 11240)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
