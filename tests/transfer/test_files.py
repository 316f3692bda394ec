"""Versions as files: what changed brings the same bits as everything, read in any order; nothing needed is removed."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.boxes import whole
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece
from megatron_hpt.transfer.transports.files import KEPT, FileIncoming, FileSink, announce, version_folder, versions


class Writer:
    """One rank that writes two tensors of a dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype, full_every: int) -> None:
        self.folder, self.values = folder, [torch.randn(40, 7).to(dtype), torch.randn(33).to(dtype)]
        self.boxes = [(f"t{i}", whole(tuple(t.shape))) for i, t in enumerate(self.values)]
        self.sink = FileSink(folder, 0, self.boxes, [dtype, dtype], full_every)
        self.pieces = [
            Piece(name, box, 0, at, value.nbytes)
            for (name, box), at, value in zip(self.boxes, self.sink.positions, self.values, strict=True)
        ]
        shapes = {name: box.extent for name, box in self.boxes}
        kind = str(dtype).removeprefix("torch.")
        self.contents = Contents("s", "files", kind, shapes, (self.sink.source,), tuple(self.pieces))

    def write(self, version: int) -> None:
        sums = tuple(self.sink.put(i, value) for i, value in enumerate(self.values))
        self.sink.commit(version)
        announce(self.folder, self.contents, Manifest("s", self.contents.digest, version, sums, True))

    def read(self, incoming: FileIncoming, version: int) -> list[torch.Tensor]:
        taken = dict(incoming.receive(version))
        return [
            incoming.view(n, p).view(v.dtype).view(v.shape).clone()
            for (n, p), v in zip(taken.items(), self.values, strict=True)
        ]

    def reader(self) -> FileIncoming:
        return FileIncoming(Contents.from_json(self.contents.to_json()).sources, list(enumerate(self.pieces)))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_reader_gets_the_bits_of_every_version(tmp_path_factory, seed: int, full_every: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    writer = Writer(tmp_path_factory.mktemp("versions"), dtype, full_every)
    steady, seldom = writer.reader(), writer.reader()
    for version in range(1, 9):
        for value in writer.values:
            share = rng.choice([0.0, 0.01, 0.5])
            chosen = torch.rand(value.shape) < share
            value[chosen] = torch.randn(value.shape).to(dtype)[chosen]
            if share and rng.random() < 0.2:
                value.view(-1)[0] = rng.choice([float("nan"), -0.0, float("inf")])
        writer.write(version)
        readers = [steady, *([seldom] if rng.random() < 0.4 else []), *([writer.reader()] if rng.random() < 0.4 else [])]
        for reader in readers:
            for found, sent in zip(writer.read(reader, version), writer.values, strict=True):
                bits = torch.int32 if dtype is torch.float32 else torch.int16
                assert torch.equal(found.view(bits), sent.view(bits))
    kept = versions(writer.folder)
    assert kept[-KEPT:] == [6, 7, 8]
    assert len(kept) <= KEPT + full_every


def test_a_whole_file_is_a_safetensors_file_and_differences_are_small(tmp_path: Path) -> None:
    writer = Writer(tmp_path, torch.float32, 10)
    writer.write(1)
    writer.values[0][3, 3] += 1
    writer.write(2)
    with safe_open(version_folder(tmp_path, 1) / "rank_0000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("t1@0"), writer.values[1])
    assert (version_folder(tmp_path, 2) / "rank_0000.delta").stat().st_size == 8 + 20 + 4 + 4


def test_a_resumed_run_writes_its_versions_again(tmp_path: Path) -> None:
    for full_every in (1, 3, 2):
        writer = Writer(tmp_path, torch.float32, full_every)
        for version in (4, 5, 6):
            writer.values[1][version] += 1
            writer.write(version)
            for found, sent in zip(writer.read(writer.reader(), version), writer.values, strict=True):
                assert torch.equal(found, sent)


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:8] + b"\xff" * 20 + data[28:], lambda _: b"x"])
def test_a_damaged_difference_is_refused(tmp_path: Path, damage) -> None:
    writer = Writer(tmp_path, torch.float32, 10)
    writer.write(1)
    writer.values[0][3, 3] += 1
    writer.write(2)
    path = version_folder(tmp_path, 2) / "rank_0000.delta"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TransferError, match="is damaged"):
        writer.read(writer.reader(), 2)
    with pytest.raises(TransferError, match=r"version 7 has neither rank_0000.safetensors nor rank_0000.delta"):
        writer.read(writer.reader(), 7)
