"""The trainer's side of the weight transfer: every rank contributes boxes that it holds, as the plan says.

Each rank brings its own boxes, under their Hugging Face names, to where the transport wants them. Rank 0 collects their
checksums (no weights), makes the manifests and drives all engines at once. No tensor is gathered.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch.distributed as dist

from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import ShardView
from megatron_hpt.transfer.manifest import Contents, session_name
from megatron_hpt.transfer.sending.driver import EngineDriver
from megatron_hpt.transfer.sending.group import TrainerGroup
from megatron_hpt.transfer.sending.options import DEFAULT_OPTIONS, Target, TransferOptions
from megatron_hpt.transfer.sending.routes import Routes
from megatron_hpt.transfer.sending.staging import Staging
from megatron_hpt.transfer.transports import Outgoing, files
from megatron_hpt.transfer.wire_format import Wire


class WeightSender:
    """Publishes versions of the actor's weights to engines. All methods but `close` are collective over the trainer's ranks."""

    def __init__(
        self,
        views: Sequence[ShardView],
        shape: ModelShape,
        targets: Sequence[Target],
        group: dist.ProcessGroup,
        options: TransferOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Plan the transfer and lay out this rank's part of it.

        Args:
            views: every box that this rank holds, replicas included (`actor.model.policy.views`).
            targets: all engines; connections are used on rank 0 only.
            group: all trainer ranks, on a backend that moves Python objects on the host (gloo).

        Raises:
            TransferError: on every rank, an engine's box that no rank holds, or ranks that hold parts of FP8 blocks.
        """
        self._group, self._options = TrainerGroup(group), options
        wire = Wire(shape, str(next(iter(views)).view.dtype).removeprefix("torch."), options.fp8)
        layouts = [target.layout for target in targets]
        self._routes = Routes(self._group, wire, views, layouts, options.transport)
        session = self._group.broadcast(session_name() if self._group.is_first else None)
        self._folder = Path(options.folder).resolve() / session
        boxes = self._routes.boxes
        dtypes = [wire.dtype_of(name) for name, _ in boxes]
        outgoing = Outgoing(self._group.rank, boxes, dtypes, str(self._folder), options.full_every)
        self._staging = Staging(self._group, wire, views, options.transport, outgoing)
        self._routes.settle(session, self._staging.sink)
        self._driver = EngineDriver(self._group, list(targets), options, self._routes, self._staging.sink)
        self.plan = self._routes.plan

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one copy of what travels."""
        return sum({(send.name, send.box): send.nbytes for send in self.plan.sends}.values())

    def publish(self, version: int) -> dict[str, float]:
        """Bring every engine to `version`, which is the weights as they now are.

        With `TransferOptions.sleep` engines take memory for weights only, and sample after `serve`. An engine that is gone
        is left out: it gets its weights when it has been started again (`renew`), or with the next version.

        Returns:
            Metrics: bytes of the weights, and on rank 0 the seconds of each part of the way, of the slowest engine.

        Raises:
            HptError: on every rank, with what any of them met.
        """
        started = time.perf_counter()
        self._driver.staged = self._staging.stage(version)
        if self._options.transport == "files":
            self._group.collectively(self._announce if self._group.is_first else lambda: None)
        staged = time.perf_counter() - started
        steps = self._driver.bring(self._driver.engines)
        seconds = {f"time/transfer_{step}_s": value for step, value in {"stage": staged, **steps}.items()}
        return {"weights/bytes": self.nbytes, **seconds}

    @cached_property
    def _all_contents(self) -> Contents:
        return self._routes.contents(None)

    def _announce(self) -> None:
        """Make a version of the files, which all ranks have written."""
        files.announce(self._folder, self._all_contents, self._driver.staged.manifest(self._all_contents, compare=True))

    def renew(self, url: str) -> None:
        """Bring one engine, which was started again, to the version that was published last.

        Raises:
            HptError: as `publish`.
        """
        self._driver.renew(url)

    def sleep(self) -> None:
        """Have all engines give their memory to the trainer, with `TransferOptions.sleep`; one that is gone has none.

        Raises:
            HptError: on every rank, what an engine answered.
        """
        self._driver.sleep()

    def serve(self) -> None:
        """Have all engines that have the last version take memory for caches and sample, with `TransferOptions.sleep`.

        Raises:
            HptError: as `sleep`.
        """
        self._driver.let_sample(self._driver.engines)

    def close(self) -> None:
        """Free what the transport holds."""
        self._staging.sink.close()
