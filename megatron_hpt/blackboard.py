"""Small values that the processes of a run share: a torch TCPStore with deadlines whose errors name who is late.

The docstring of `rollout.coordinator` lists every key, with who writes it and who waits for it.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistError, DistStoreError, TCPStore

from megatron_hpt.errors import DeadlineError

NOTICE = "notice"
"""Key that is set when the run is to save and end soon."""
_POLL_S = 0.05


def ready(part: str) -> str:
    """The key by which a part of the run says that it has started."""
    return f"ready/{part}"


class Blackboard:
    """JSON values by key. The supervisor hosts it, so it outlives every part of the run."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store

    @classmethod
    def host(cls, address: str = "127.0.0.1") -> Blackboard:
        """Open a server on a free port of the loopback interface, or of the one that has the address."""
        listener = socket.create_server((address, 0))  # given an address alone, TCPStore listens on all of them
        port = listener.getsockname()[1]
        fd = listener.detach()  # the store closes it
        return cls(TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=fd))

    @classmethod
    def join(cls, address: str) -> Blackboard:
        """Connect to ``host:port``.

        Raises:
            DeadlineError: nobody answers there.
        """
        host, port = address.rsplit(":", 1)
        try:
            return cls(TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=30)))
        except (DistError, OSError) as error:
            raise DeadlineError(f"the supervisor's store at {address} does not answer: {error}") from None

    @property
    def address(self) -> str:
        """``host:port`` for `join`."""
        return f"{self._store.host}:{self._store.port}"

    def put(self, key: str, value: Any) -> None:
        """Set a key."""
        self._store.set(key, json.dumps(value))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or `default` if it is not set yet."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else default

    def wait_any(self, keys: Sequence[str], seconds: float, late: str) -> str:
        """Wait until one of the keys is set, and return that key; of several that are set the first in `keys`.

        Raises:
            DeadlineError: none was set in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for key in keys:
                if self._store.check([key]):
                    return key
            time.sleep(_POLL_S)
        raise DeadlineError(f"{late} is late: none of {', '.join(map(repr, keys))} came within {seconds:.0f} s")

    def wait(self, key: str, seconds: float, late: str) -> Any:
        """Wait until a key is set, and return its value.

        Args:
            late: who is expected to set it, for the error.

        Raises:
            DeadlineError: it was not set in time.
        """
        try:
            self._store.wait([key], datetime.timedelta(seconds=seconds))
        except DistStoreError:
            raise DeadlineError(f"{late} is late: {key!r} did not come within {seconds:.0f} s") from None
        return json.loads(self._store.get(key))

    async def wait_beside(self, key: str, seconds: float, late: str) -> Any:
        """As `wait`, while the event loop goes on.

        Raises:
            DeadlineError: it was not set in time.
        """
        deadline = time.monotonic() + seconds
        while (value := self.get(key)) is None:
            if time.monotonic() > deadline:
                raise DeadlineError(f"{late} is late: {key!r} did not come within {seconds:.0f} s")
            await asyncio.sleep(_POLL_S)
        return value
