"""What stands in for a `sender.WeightSender` where there are no engines."""

from __future__ import annotations


class NoEngines:
    """Sends nothing to nobody; the trainer of a run from a ledger has it in place of a sender."""

    def publish(self, version: int) -> dict[str, float]:
        return {"weights/bytes": 0}

    def renew(self, url: str) -> None:
        pass

    def sleep(self) -> None:
        pass

    def serve(self) -> None:
        pass

    def close(self) -> None:
        pass
