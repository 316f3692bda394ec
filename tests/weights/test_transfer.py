"""Manifests, segments and the receiver: what is whole arrives, what is not is refused before anything is loaded."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.manifest import Manifest, checksum
from megatron_hpt.weights.mapping import ShardView
from megatron_hpt.weights.receiver import Receiver
from megatron_hpt.weights.sender import lay_out
from megatron_hpt.weights.transports.shared_memory import SenderSegment

EXPECTED = {"a": (4, 3), "b": (5,)}
A, B = torch.arange(12.0).reshape(4, 3), torch.arange(5.0) - 7


def sent(version: int = 1) -> tuple[list[SenderSegment], Manifest]:
    """Tensor a in two halves from two segments, b from the second."""
    shards = (
        [ShardView("a", (4, 3), (0, 0), (2, 3), A[:2])],
        [ShardView("a", (4, 3), (2, 0), (2, 3), A[2:]), ShardView("b", (5,), (0,), (5,), B)],
    )
    segments, pieces = [], []
    for index, views in enumerate(shards):
        laid_out, nbytes = lay_out(views)
        segment = SenderSegment(nbytes)
        for piece, view in zip(laid_out, views, strict=True):
            crc32 = checksum(segment.put(piece.position, view.read()))
            pieces.append(replace(piece, segment=index, crc32=crc32))
        segments.append(segment)
    return segments, Manifest(version, tuple(s.description for s in segments), tuple(pieces))


def received(manifest: Manifest) -> dict[str, torch.Tensor]:
    receiver = Receiver(EXPECTED)
    receiver.verify(manifest)
    return {name: tensor.clone() for name, tensor in receiver.tensors(manifest)}


def test_tensors_arrive_equal_through_json() -> None:
    segments, manifest = sent()
    arrived = received(Manifest.from_json(json.loads(json.dumps(manifest.to_json()))))
    assert torch.equal(arrived["a"], A)
    assert torch.equal(arrived["b"], B)
    assert len(segments) == 2


def _child(manifest: Manifest, out) -> None:
    out.put({name: tensor.tolist() for name, tensor in received(manifest).items()})


@pytest.mark.slow
def test_another_process_reads_the_same_memory() -> None:
    segments, manifest = sent()
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_child, args=(manifest, out))
    child.start()
    assert out.get(timeout=120) == {"a": A.tolist(), "b": B.tolist()}
    child.join()
    assert len(segments) == 2


def test_a_flipped_bit_is_found_and_named() -> None:
    segments, manifest = sent()
    segments[1].bytes[0] ^= 1
    with pytest.raises(TransferError, match=r"version 1: a at \(2, 0\) arrived damaged"):
        received(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], r"1 tensors missing \(b\)"),
        (lambda p: p[1:], "a: its pieces do not cover"),
        (lambda p: (*p, p[0]), "a: two pieces overlap"),
        (lambda p: (*p, replace(p[2], name="c")), r"1 unknown \(c\)"),
        (lambda p: (replace(p[0], shape=(2, 3)), *p[1:]), r"a has shape \(2, 3\), expected \(4, 3\)"),
        (lambda p: (replace(p[0], offset=(3, 0)), *p[1:]), "does not fit"),
        (lambda p: (replace(p[0], dtype="bfloat16"), *p[1:]), "does not fit"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(change, message: str) -> None:
    _segments, manifest = sent()
    with pytest.raises(TransferError, match=message):
        received(replace(manifest, pieces=tuple(change(manifest.pieces))))


def test_a_malformed_manifest_is_refused() -> None:
    with pytest.raises(TransferError, match="malformed"):
        Manifest.from_json({"version": 1, "pieces": [{"name": "a"}], "segments": []})


def test_a_sender_that_is_gone_is_named() -> None:
    segments, manifest = sent()
    for segment in segments:
        segment.close()
    with pytest.raises(TransferError, match=f"cannot map the weights of process {os.getpid()}"):
        received(manifest)


def test_closing_frees_the_memory() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for segment in sent()[0]:
            segment.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not dist.is_initialized()
