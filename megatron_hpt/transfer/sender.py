"""The trainer's side of the weight transfer: every rank contributes boxes that it holds, as the plan says.

Each rank brings its own boxes, under their Hugging Face names, to where the transport wants them. Rank 0 collects their
checksums (no weights), makes the manifests and drives all engines at once. No tensor is gathered.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hpt.config import Config
from megatron_hpt.errors import EngineGone, HptError, TransferError
from megatron_hpt.models.hf_config import ModelShape, read_config
from megatron_hpt.models.mapping import ShardView
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.control import EngineControl, Memory
from megatron_hpt.transfer.layouts import EngineLayout, Held, engine_holdings
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece
from megatron_hpt.transfer.plan import Send, TransferPlan, make_plan
from megatron_hpt.transfer.quantize import PER_TENSOR, Fp8Format, is_quantized
from megatron_hpt.transfer.transports import TRANSPORTS, Outgoing, files
from megatron_hpt.transfer.wire import Wire, fp8_format

logger = logging.getLogger(__name__)


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
    """Versions after which engines compare their weights with what was sent; the first always."""
    deadline_s: float = 60.0
    """Longest wait for one message."""
    host: str = "127.0.0.1"
    """Address of the trainer's first rank that engines reach, for transports that talk."""
    folder: str = ""
    """Of files: where versions lie."""
    full_every: int = 1
    """Of files: every k-th version is whole, those between hold what changed."""
    fp8: Fp8Format | None = None
    """Engines hold an FP8 checkpoint: weights are converted on the way."""
    sleep: bool = False
    """Engines sleep on the trainer's GPUs: `WeightSender.sleep` and `WeightSender.serve` say when."""

    @classmethod
    def of_run(cls, config: Config) -> TransferOptions:
        """Those of a run."""
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


def _fused(name: str) -> str:
    """The projection that an engine fuses a tensor into: its parts get one scale, so that nothing is rounded twice."""
    return re.sub(r"\b([qkv]|gate|up)_proj|\bw[13]\b", lambda found: "qkv" if found[0][0] in "qkv" else "gate_up", name)


def session_name() -> str:
    """A name for one trainer from start to end, that a person can place."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


class WeightSender:
    """Publishes versions of the actor's weights to engines; collective over `group`."""

    def __init__(
        self,
        views: Sequence[ShardView],
        shape: ModelShape,
        targets: Sequence[Target],
        group: dist.ProcessGroup,
        options: TransferOptions = TransferOptions(),
    ) -> None:
        """Plan the transfer and lay out this rank's part of it.

        Args:
            views: every box that this rank holds, replicas included (`actor.model.views`).
            targets: all engines; connections are used on rank 0 only.
            group: all trainer ranks, on a backend that moves Python objects on the host (gloo).

        Raises:
            TransferError: on every rank, an engine's box that no rank holds, or ranks that hold parts of FP8 blocks.
        """
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self._targets, self._options, self._transport = list(targets), options, TRANSPORTS[options.transport]
        self._views: dict[str, list[ShardView]] = {}
        for view in views:
            self._views.setdefault(view.name, []).append(view)
        dtype = str(next(iter(views)).view.dtype).removeprefix("torch.")
        self._wire = Wire(shape, dtype, options.fp8)
        self._tensors = self._wire.tensors
        self.plan = self._make_plan(shape)
        # One copy of a box serves all messages that carry it.
        self._boxes = list(dict.fromkeys((send.name, send.box) for send in self.plan.sends if send.sender == self._rank))
        dtypes = [self._wire.dtype_of(name) for name, _ in self._boxes]
        session = self._told(session_name() if self._rank == 0 else None)
        self._folder = Path(options.folder).resolve() / session
        outgoing = Outgoing(self._rank, self._boxes, dtypes, str(self._folder), options.full_every)
        self._listeners: dict[int, socket.socket] = {}
        self._raise_any(self._attempt(lambda: self._open(outgoing)))
        ends = self._gathered((self._sink.source, self._boxes, self._sink.positions))
        self._places = [dict(zip(boxes, positions, strict=True)) for _, boxes, positions in ends]
        sources = tuple(source for source, _, _ in ends)
        self._contents = [
            Contents(session, options.transport, dtype, self._tensors, sources, self._pieces(engine))
            for engine in range(len(self._targets))
        ]
        talks = range(len(self._targets)) if self._transport.meets else ()
        self._messages = {engine: self._messages_to(engine) for engine in talks}
        self._prepared: set[int] = set()
        self._version: int | None = None
        self._checksums: list[dict[tuple[str, Box], int]] = []

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one copy of what travels."""
        return sum({(send.name, send.box): send.nbytes for send in self.plan.sends}.values())

    def publish(self, version: int) -> dict[str, float]:
        """Bring every engine to `version`; with `Options.sleep` they take memory for weights only, and serve after `serve`.

        An engine that is gone is left out: when it is there again, it asks for its weights itself (`renew`), or gets
        the next version.

        Returns:
            Metrics: bytes of the weights, and on rank 0 the seconds of each part of the way, of the slowest engine.

        Raises:
            HptError: on every rank, with what any of them met.
        """
        started = time.perf_counter()
        checksums: dict[tuple[str, Box], int] = {}
        self._amax = self._largest()
        self._raise_any(self._attempt(lambda: self._stage(version, checksums)))
        self._checksums, self._version = self._gathered(checksums), version
        if self._options.transport == "files":
            self._raise_any(self._attempt(self._announce) if self._rank == 0 else None)
        staged = time.perf_counter() - started
        steps = self._bring(range(len(self._targets)))
        seconds = {f"time/transfer_{step}_s": value for step, value in {"stage": staged, **steps}.items()}
        return {"weights/bytes": self.nbytes, **seconds}

    def renew(self, url: str) -> None:
        """Bring one engine, which was started again, to the version that was published last; collective.

        Raises:
            HptError: on every rank, as `publish`.
        """
        engines = [engine for engine, target in enumerate(self._targets) if target.control.url == url]
        for engine in engines:
            self._targets[engine].control.note_restart()
        if self._version is not None:  # else it gets its first version with all others
            self._bring(engines)
            self._let_sample(engines)

    def sleep(self) -> None:
        """With `Options.sleep`: have all engines give their memory to the trainer; collective. One that is gone has none.

        Raises:
            HptError: on every rank, what an engine answered.
        """
        if self._options.sleep:
            self._on_engines(range(len(self._targets)), lambda control: control.sleep())

    def serve(self) -> None:
        """With `Options.sleep`: have all engines that have the last version take memory for caches, and sample; collective.

        Raises: as `sleep`.
        """
        self._let_sample(range(len(self._targets)))

    def _let_sample(self, engines: Sequence[int]) -> None:
        def take_and_sample(control: EngineControl) -> None:
            control.wake(Memory.CACHE)
            control.resume()

        if self._options.sleep:
            self._on_engines([engine for engine in engines if engine in self._prepared], take_and_sample)

    def _on_engines(self, engines: Sequence[int], action: Callable[[EngineControl], None]) -> None:
        """Rank 0 does something with engines, all at once; the others wait for it."""

        def one(engine: int) -> HptError | None:
            met = self._attempt(lambda: action(self._targets[engine].control))
            if isinstance(met, EngineGone):
                self._note_gone(engine, met)
                return None
            return met

        failed = None
        if self._rank == 0 and engines:
            with ThreadPoolExecutor(len(engines)) as pool:
                failed = next(filter(None, pool.map(one, engines)), None)
        self._raise_any(failed)

    def close(self) -> None:
        """Free what the transport holds."""
        self._sink.close()

    def _open(self, outgoing: Outgoing) -> None:
        self._sink = self._transport.sink(outgoing)

    @torch.no_grad()
    def _stage(self, version: int, checksums: dict[tuple[str, Box], int]) -> None:
        """Bring this rank's boxes to where the transport wants them."""
        for index, box in enumerate(self._boxes):
            checksums[box] = self._sink.put(index, self._source(*box))
        self._sink.commit(version)

    def _announce(self) -> None:
        """All files of a version are there: make it one."""
        contents = replace(self._contents[0], pieces=self._pieces(None))
        files.announce(self._folder, contents, self._manifest(contents, compare=True))

    def _make_plan(self, shape: ModelShape) -> TransferPlan:
        mine = [box for views in self._views.values() for view in views for box in self._wire.boxes_of(view)]
        held: dict[str, dict[Box, list[int]]] = {name: {} for name in self._tensors}
        for rank, boxes in enumerate(self._gathered(mine)):
            for name, box in boxes:
                held[name].setdefault(box, []).append(rank)
        self._wire.check_cuts(held)
        actor: dict[str, Held] = {n: [(box, tuple(ranks)) for box, ranks in found.items()] for n, found in held.items()}
        layouts = {target.layout for target in self._targets}
        holdings = {layout: engine_holdings(self._tensors, shape, layout) for layout in layouts}
        engines = [(holdings[target.layout], target.layout.ranks) for target in self._targets]
        multicast = self._transport.multicast
        return make_plan(
            self._tensors,
            self._wire.item_bytes,
            actor,
            engines,
            self._size,
            multicast=multicast,
            row_multiple=self._wire.row_multiple,
        )

    def _of_engine(self, engine: int | None) -> list[tuple[Send, tuple[int, ...]]]:
        """Sends that concern an engine (None: all) in the global order, with its ranks that receive each."""
        if engine is None:
            return [(send, ()) for send in self.plan.sends]
        first = sum(target.layout.ranks for target in self._targets[:engine])
        own = range(first, first + self._targets[engine].layout.ranks)
        with_ranks = ((send, tuple(r - first for r in send.receivers if r in own)) for send in self.plan.sends)
        return [(send, ranks) for send, ranks in with_ranks if ranks]

    def _pieces(self, engine: int | None) -> tuple[Piece, ...]:
        talks = self._transport.meets
        return tuple(
            Piece(s.name, s.box, s.sender, self._places[s.sender][s.name, s.box], s.nbytes, ranks if talks else ())
            for s, ranks in self._of_engine(engine)
        )

    def _messages_to(self, engine: int) -> list[tuple[int, int, int]]:
        """What this rank sends to an engine: (box, piece, rank in the group of both)."""
        numbers = {box: i for i, box in enumerate(self._boxes)}
        return [
            (numbers[send.name, send.box], piece, self._size + rank)
            for piece, (send, ranks) in enumerate(self._of_engine(engine))
            if send.sender == self._rank
            for rank in ranks
        ]

    def _manifest(self, contents: Contents, *, compare: bool) -> Manifest:
        checksums = tuple(self._checksums[piece.source][piece.name, piece.box] for piece in contents.pieces)
        return Manifest(contents.session, contents.digest, self._version, checksums, compare)

    def _source(self, name: str, box: Box) -> torch.Tensor:
        """The box of a tensor as it travels, out of the local parameters; a copy only where layouts or formats differ."""
        plain = self._wire.plain_name(name)
        for view in self._views.get(plain, ()):
            held = dict(self._wire.boxes_of(view)).get(name)
            if held == box:
                return self._wire.converted(view, self._amax.get(plain))[name]
            if held is not None and held.common(box) == box:
                return self._part(view, name, box.inside(held))
        raise TransferError(f"{name} at {box.offset} is not held by rank {self._rank}, which was to send it")

    def _part(self, view: ShardView, name: str, inner: Box) -> torch.Tensor:
        """A part of a held box; a part of a quantised matrix is quantised alone, where the cut allows it."""
        if name != view.name:
            return self._wire.converted(view, self._amax.get(view.name))[name][inner.slices]
        offset = tuple(a + b for a, b in zip(view.offset, inner.offset, strict=True))
        part = ShardView(view.name, view.shape, offset, inner.extent, view.read()[inner.slices])
        return self._wire.converted(part, self._amax.get(view.name))[name]

    @torch.no_grad()
    def _largest(self) -> dict[str, torch.Tensor]:
        """Where a tensor has one scale: its largest magnitude over all ranks, common to the parts of a fused projection."""
        if self._options.fp8 != PER_TENSOR:
            return {}
        mine: dict[str, float] = {}
        for name, views in self._views.items():
            if is_quantized(name):
                mine[name] = max(float(PER_TENSOR.amax(view.read()).max()) for view in views)
        largest: dict[str, float] = {}
        everyone = self._gathered(mine)
        for found in everyone:
            for name, value in found.items():
                largest[_fused(name)] = max(value, largest.get(_fused(name), 0.0))
        return {name: torch.tensor([largest[_fused(name)]]) for found in everyone for name in found}

    def _bring(self, engines: Sequence[int]) -> dict[str, float]:
        """All ranks: talk to the engines that are there, while rank 0 drives them; decide together how it went."""
        steps: dict[str, float] = {}
        meetings: dict[int, dict[str, Any] | None] = {}
        self._raise_any(self._attempt(lambda: meetings.update(self._look(engines))) if self._rank == 0 else None)
        meetings = self._told(meetings)
        there = list(meetings)
        with ThreadPoolExecutor(max(1, 2 * len(there))) as pool:
            talks = [pool.submit(self._attempt, lambda e=e: self._talk(e, meetings[e])) for e in there]
            driven = there if self._rank == 0 else ()
            drives = [pool.submit(self._attempt, lambda e=e: self._drive(e, meetings[e], steps)) for e in driven]
            own = [talk.result() for talk in talks]
            # What the engine says comes first: it knows more than a rank whose message was not taken.
            told = [drive.result() for drive in drives] or [None] * len(own)
        for engine, *met in zip(there, *self._gathered_first(told, own), strict=True):
            error = next(filter(None, met), None)
            (self._prepared.discard if error else self._prepared.add)(engine)
            if isinstance(error, EngineGone):
                self._note_gone(engine, error)
            elif error is not None:
                raise error
        return steps

    def _look(self, engines: Sequence[int]) -> dict[int, dict[str, Any] | None]:
        """Engines that are there and lack the version → where to meet; None: prepared, and serving the one before."""

        def one(engine: int) -> int | EngineGone | None:
            try:
                return self._targets[engine].control.version()
            except EngineGone as error:
                return error

        with ThreadPoolExecutor(max(1, len(engines))) as pool:
            versions = dict(zip(engines, pool.map(one, engines), strict=True))
        found: dict[int, dict[str, Any] | None] = {}
        for engine, version in versions.items():
            if isinstance(version, EngineGone):
                self._note_gone(engine, version)
            elif version is None or engine not in self._prepared:
                found[engine] = self._rendezvous(engine)  # a server that was started again knows nothing
            elif version != self._version:
                found[engine] = None
        return found

    def _note_gone(self, engine: int, error: EngineGone) -> None:
        self._prepared.discard(engine)
        if self._rank == 0:
            url = self._targets[engine].control.url
            logger.warning("engine %s is gone, version %s goes on without it: %s", url, self._version, error)

    def _gathered_first(self, told: list, own: list) -> list[list]:
        """Outcomes by engine: rank 0's drive, then what each rank met."""
        everyone = self._gathered((told, own))
        return [everyone[0][0], *(met for _, met in everyone)]

    def _rendezvous(self, engine: int) -> dict[str, Any]:
        if not self._transport.meets:
            return {}
        from megatron_hpt.transfer.transports.collective import library

        # The store gets the open socket: given an address alone it would listen on all of them.
        self._listeners[engine] = socket.create_server((self._options.host, 0))
        return {
            "host": self._options.host,
            "port": self._listeners[engine].getsockname()[1],
            "senders": self._size,
            "size": self._size + self._targets[engine].layout.ranks,
            "seconds": self._options.deadline_s,
            "library": library(self._options.transport),
        }

    def _talk(self, engine: int, rendezvous: dict[str, Any] | None) -> None:
        if self._transport.meets:
            if rendezvous:
                self._sink.meet(engine, rendezvous, self._rank, self._listeners.pop(engine, None))
            self._sink.transmit(engine, self._messages[engine])

    def _drive(self, engine: int, rendezvous: dict[str, Any] | None, steps: dict[str, float]) -> None:
        control = self._targets[engine].control
        if self._options.sleep:
            control.wake(Memory.WEIGHTS)
        fresh = rendezvous is not None
        if fresh:
            self._contents[engine] = replace(self._contents[engine], rendezvous=rendezvous)
            control.prepare(self._contents[engine])
        compare = fresh or self._version % self._options.compare_every == 0
        for step, seconds in control.update(self._manifest(self._contents[engine], compare=compare)).items():
            steps[step] = max(seconds, steps.get(step, 0.0))
        if not self._options.sleep:
            control.resume()

    def _attempt(self, action: Callable[[], None]) -> HptError | None:
        try:
            action()
        except HptError as error:
            return error
        except Exception as error:  # told to all ranks, which would else wait for this one
            logger.exception("weight transfer")
            return TransferError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return None

    def _raise_any(self, met: HptError | None) -> None:
        """Raise on every rank what any of them met."""
        for error in self._gathered(met):
            if error is not None:
                raise error

    def _gathered(self, mine: Any) -> list:
        everyone: list = [None] * self._size
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _told(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
