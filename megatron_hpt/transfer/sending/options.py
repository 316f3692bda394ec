"""How weights travel, and to which engines: what a recipe and a launcher tell a sender."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import read_config
from megatron_hpt.transfer.control import EngineControl
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.quantize import Fp8Format
from megatron_hpt.transfer.wire_format import fp8_format


@dataclass(frozen=True)
class Target:
    """One engine that is to be served."""

    control: EngineControl
    layout: EngineLayout


@dataclass(frozen=True)
class TransferOptions:
    """How weights travel."""

    transport: str = "shared_memory"
    """A row of `transports.TRANSPORTS`."""
    compare_every: int = 50
    """Versions after which engines compare their weights with what was sent; they always compare the first one, and each after
    they have slept."""
    deadline_s: float = 60.0
    """Longest wait for one message."""
    host: str = "127.0.0.1"
    """Address of the trainer's first rank that engines reach, for transports with `Transport.meets`."""
    folder: str = ""
    """Where the transport ``files`` writes versions."""
    full_every: int = 1
    """The transport ``files`` writes every k-th version whole, and between them only what changed."""
    fp8: Fp8Format | None = None
    """The format of the engines' FP8 checkpoint, into which weights are converted on the way."""
    sleep: bool = False
    """Engines sleep on the trainer's GPUs: `WeightSender.sleep` and `WeightSender.serve` say when."""

    @classmethod
    def of_run(cls, config: Config) -> TransferOptions:
        """Read the options out of a run's configuration."""
        transfer = config.transfer
        return cls(
            transport=transfer.transport,
            compare_every=transfer.compare_every,
            deadline_s=config.deadlines.transfer_s,
            host=transfer.host,
            folder=transfer.folder,
            full_every=transfer.full_every,
            fp8=fp8_format(read_config(config.engine_model)),
            sleep=config.rollout.sleep,
        )


DEFAULT_OPTIONS = TransferOptions()
