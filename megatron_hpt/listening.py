"""Whether anybody listens at a server's address: the one thing that a dying server cannot get wrong."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def refuses(url: str, seconds: float = 1.0) -> bool:
    """Connections to a server are refused. One that takes none for `seconds` may be busy: that is not a refusal."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout=seconds).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
