"""Contents, manifests and the receiver: what is whole arrives, what is not is refused before anything is loaded."""

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.checksum import checksum_of, copy_and_hash
from megatron_hpt.errors import TransferError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece
from megatron_hpt.transfer.receiver import Receiver, Seat
from megatron_hpt.transfer.transports.mapped import SegmentSink

SHAPE = ModelShape("llama", 1, 4, 2, 2, 2, 6, 9, True, 1e4, 1e-6, 8)
TENSORS = hf_tensor_shapes(SHAPE)
Q = "model.layers.0.self_attn.q_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741


class Sending:
    """A model sent from two sources: the first rows of every matrix from one, everything else from the other."""

    def __init__(self, session: str = "t1") -> None:
        torch.manual_seed(0)
        self.weights = {name: torch.randn(shape) for name, shape in TENSORS.items()}
        parts: tuple[list, list] = ([], [])
        for name, shape in TENSORS.items():
            cut = shape[0] // 2 if len(shape) == 2 else 0
            for side, (start, size) in enumerate(((0, cut), (cut, shape[0] - cut))):
                if size:
                    parts[side].append((name, Box((start, *[0] * (len(shape) - 1)), (size, *shape[1:]))))
        self.sinks = [SegmentSink([box.volume * 4 for _, box in part]) for part in parts]
        pieces = [
            Piece(name, box, source, position, box.volume * 4)
            for source, part in enumerate(parts)
            for (name, box), position in zip(part, self.sinks[source].positions, strict=True)
        ]
        sources = tuple(sink.source for sink in self.sinks)
        self.contents = Contents(session, "shared_memory", "float32", TENSORS, sources, tuple(pieces))
        self._parts = parts

    def manifest(self, version: int = 1, *, compare: bool = False) -> Manifest:
        checksums = [
            sink.put(i, self.weights[name][box.slices])
            for sink, part in zip(self.sinks, self._parts, strict=True)
            for i, (name, box) in enumerate(part)
        ]
        return Manifest(self.contents.session, self.contents.digest, version, tuple(checksums), compare)


def receiver(layout: EngineLayout = EngineLayout(), rank: int = 0) -> Receiver:  # noqa: B008
    return Receiver(Seat(SHAPE, layout, rank, "float32"))


def through_json(thing):
    return type(thing).from_json(json.loads(json.dumps(thing.to_json())))


def received(contents: Contents, manifest: Manifest) -> dict[str, torch.Tensor]:
    end = receiver()
    end.agree(through_json(contents))
    end.take(through_json(manifest))
    return {name: tensor.clone() for name, tensor in end.tensors()}


def test_tensors_arrive_equal_through_json() -> None:
    sending = Sending()
    arrived = received(sending.contents, sending.manifest())
    assert arrived.keys() == TENSORS.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sending.weights.items())


def test_an_engine_rank_gets_its_part_and_the_next_version_by_the_same_contents() -> None:
    sending, end = Sending(), receiver(EngineLayout(2), 1)
    end.agree(sending.contents)
    for version in (1, 2):
        sending.weights = {name: tensor + 1 for name, tensor in sending.weights.items()}
        end.take(sending.manifest(version))
        arrived = dict(end.tensors())
        assert torch.equal(arrived[Q][2:], sending.weights[Q][2:])
        assert torch.equal(arrived[O][:, 2:], sending.weights[O][:, 2:])


def _child(contents: Contents, manifest: Manifest, out) -> None:
    out.put({name: tensor.tolist() for name, tensor in received(contents, manifest).items()})


@pytest.mark.slow
def test_another_process_reads_the_same_memory() -> None:
    sending = Sending()
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_child, args=(sending.contents, sending.manifest(), out))
    child.start()
    assert out.get(timeout=120) == {name: tensor.tolist() for name, tensor in sending.weights.items()}
    child.join()


def test_a_flipped_bit_is_found_and_named() -> None:
    sending = Sending()
    manifest = sending.manifest()
    sending.sinks[1]._segment.bytes[0] ^= 1
    first = next(piece.name for piece in sending.contents.pieces if piece.source == 1)
    with pytest.raises(TransferError, match=rf"version 1: {first} at \(\d+, \d+\) arrived damaged"):
        received(sending.contents, manifest)


def drop(contents: Contents, name: str) -> Contents:
    return replace(contents, pieces=tuple(p for p in contents.pieces if p.name != name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: replace(drop(c, Q), shapes={n: s for n, s in c.shapes.items() if n != Q}),
            r"1 tensors missing \(model.*q_proj",
        ),
        (lambda c: replace(c, shapes={**c.shapes, "c": (1,)}), r"1 unknown \(c\)"),
        (lambda c: replace(c, shapes={**c.shapes, Q: (2, 3)}), r"q_proj.weight has shape \(2, 3\), expected \(4, 4\)"),
        (lambda c: replace(c, dtype="bfloat16"), "the weights are bfloat16, the engine wants float32"),
        (lambda c: drop(c, Q), r"q_proj.weight at .*: its pieces do not cover it"),
        (lambda c: replace(c, pieces=(*c.pieces, c.pieces[1])), "two pieces overlap"),
        (lambda c: replace(c, pieces=(*c.pieces, replace(c.pieces[0], box=Box((8, 0), (3, 4))))), "does not fit"),
        (lambda c: replace(c, transport="pigeon"), "transport 'pigeon' is not known here; known: shared_memory, files"),
        (lambda c: replace(c, sources=({"path": "/proc/0/fd/0", "nbytes": 1},) * 2), "cannot map the weights"),
    ],
)
def test_contents_that_are_not_the_model_are_refused(change: Callable[[Contents], Contents], message: str) -> None:
    sending = Sending()
    changed = change(sending.contents)
    with pytest.raises(TransferError, match=message):
        received(changed, replace(sending.manifest(), contents=changed.digest))


def test_a_manifest_of_something_else_is_refused() -> None:
    sending, end = Sending(), receiver()
    manifest = sending.manifest()
    with pytest.raises(TransferError, match="nothing has been agreed on"):
        end.take(manifest)
    end.agree(sending.contents)
    with pytest.raises(TransferError, match="does not belong to the contents"):
        end.take(replace(manifest, contents="0"))
    with pytest.raises(TransferError, match="does not belong to the contents"):
        end.take(replace(manifest, checksums=manifest.checksums[1:]))


def test_the_trainer_that_prepared_last_has_the_engine() -> None:
    first, second, end = Sending("t1"), Sending("t2"), receiver()
    end.agree(first.contents)
    end.agree(second.contents)
    with pytest.raises(TransferError, match="trainer t1 has not prepared this engine, or trainer t2 has taken it over"):
        end.take(first.manifest())
    end.take(second.manifest())


@pytest.mark.parametrize("kind", [Contents, Manifest])
def test_what_is_malformed_is_refused(kind) -> None:
    for data in ({}, {"session": "t", "pieces": [[0]], "tensors": 3}, {"session": "t", "checksums": ["x"]}):
        with pytest.raises(TransferError, match="malformed"):
            kind.from_json(data)


def test_a_sender_that_is_gone_is_named() -> None:
    sending = Sending()
    manifest = sending.manifest()
    for sink in sending.sinks:
        sink.close()
    with pytest.raises(TransferError, match=f"cannot map the weights of process {os.getpid()}"):
        received(sending.contents, manifest)


def test_comparing_finds_the_tensor_that_differs() -> None:
    sending, end = Sending(), receiver()
    end.agree(sending.contents)
    end.take(sending.manifest())
    model = {name: tensor.clone() for name, tensor in end.tensors()}
    end.compare(lambda name, box: [model[name][box.slices]])
    model[O][3, 3] += 1
    with pytest.raises(TransferError, match=r"o_proj.weight at \(2, 0\): the engine's weights are not those that were sent"):
        end.compare(lambda name, box: [model[name][box.slices]])


def test_closing_frees_the_memory() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        sending, end = Sending(), receiver()
        end.agree(sending.contents)
        end.take(sending.manifest())
        end.close()
        for sink in sending.sinks:
            sink.close()
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.integers(1, 3_000_000), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_copy_has_the_checksum_of_its_source(size: int, dtype: torch.dtype, strided: bool) -> None:
    source = torch.arange(2 * size, dtype=torch.float32).to(dtype)[::2] if strided else torch.arange(size).to(dtype)
    target = torch.empty(size, dtype=dtype)
    assert copy_and_hash(target, source) == checksum_of(source) == checksum_of(target)
    assert torch.equal(target, source)
    target.view(torch.int16)[-1] ^= 1
    assert checksum_of(target) != checksum_of(source)
