"""tools/fat_binary.py on made-up libraries of the form that CUDA's linker writes."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import programs
from tools.fat_binary import MACHINE_CODE, MAGIC, PTX, fat_binaries, keep, table

Item = tuple[int, int, bytes]
"""Kind, architecture, payload."""
items = st.tuples(
    st.sampled_from([PTX, MACHINE_CODE]),
    st.sampled_from([75, 80, 90, 100]),
    st.binary(min_size=1, max_size=9).map(lambda b: b * 8),
)
libraries = st.lists(st.lists(items, max_size=5), max_size=4)


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    head = struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 72, len(payload), 0, 64, 0, 8, architecture, 0, 0, 0x11, 0, 999)
    return head + b"HEADTAIL" + payload


def fat_binary(content: list[Item]) -> bytes:
    entries = b"".join(entry(*item) for item in content)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(entries)) + entries


def library(binaries: list[list[Item]]) -> bytes:
    """An ELF file with a section before the fat binaries and one after, which nothing may touch."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    fat = b"".join(fat_binary(binary) + bytes(8 * index) for index, binary in enumerate(binaries))  # padded unlike each other
    bodies = [b"", struct.pack("<IHHQ", MAGIC, 1, 16, 64) + b"code" * 30, fat, names]
    offsets, position = [], 64
    for body in bodies:
        offsets.append(position)
        position += len(body)
    starts = [0, 1, 7, 18]
    sections = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 2, offset, offset, len(body), 0, 0, 8, 0)
        for name, offset, body in zip(starts, offsets, bodies, strict=True)
    )
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, position, 0, 64, 0, 0, 64, 4, 3
    )
    return head + b"".join(bodies) + sections


def contents(data: bytes) -> list[list[Item]]:
    return [[(e.kind, e.architecture, bytes(data[e.start + e.header : e.end])) for e in b.entries] for b in fat_binaries(data)]


@given(libraries)
def test_one_architectures_code_stays_as_it_was_and_nothing_else_does(binaries: list[list[Item]]) -> None:
    before = library(binaries)
    assert contents(before) == binaries
    after = bytearray(before)
    dropped = keep(after, 90)
    wanted = [[item for item in binary if item[:2] == (MACHINE_CODE, 90)] for binary in binaries]
    # A fat binary without any keeps its headers; what they announce is zeros.
    blank = [[(kind, sm, bytes(len(payload))) for kind, sm, payload in binary] for binary in binaries]
    assert contents(bytes(after)) == [ours or empty for ours, empty in zip(wanted, blank, strict=True)]
    assert len(after) == len(before)
    others = [payload for binary in binaries for kind, sm, payload in binary if (kind, sm) != (MACHINE_CODE, 90)]
    assert dropped >= sum(map(len, others))
    start = 64 + len(b"code" * 30) + 16
    end = start + sum(len(fat_binary(binary)) + 8 * index for index, binary in enumerate(binaries))
    assert (after[:start], after[end:]) == (before[:start], before[end:])
    assert [binary.start for binary in fat_binaries(after)] == [binary.start for binary in fat_binaries(before)]
    again = bytearray(after)
    keep(again, 90)
    assert again == after


def test_the_command(tmp_path: Path) -> None:
    path, copy = tmp_path / "library.so", tmp_path / "copy.so"
    path.write_bytes(library([[(MACHINE_CODE, 80, b"x" * 2**20), (MACHINE_CODE, 90, b"y" * 2**19), (PTX, 90, b"z" * 2**20)]]))
    shown = programs.tool("fat_binary.py", path).stdout
    assert shown.splitlines() == [
        "PTX   sm_90       1 ×      1.00 MiB",
        "code  sm_80       1 ×      1.00 MiB",
        "code  sm_90       1 ×      0.50 MiB",
    ]
    assert "2.0 MiB of other architectures are zeros" in programs.tool("fat_binary.py", path, copy, "--keep", 90).stdout
    assert table(copy.read_bytes()) == "code  sm_90       1 ×      0.50 MiB"


@pytest.mark.parametrize(("content", "message"), [(b"text", "not a 64-bit ELF library"), (None, "No such file or directory")])
def test_what_is_no_library(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "library.so"
    if content is not None:
        path.write_bytes(content)
    done = programs.tool("fat_binary.py", path)
    assert (done.returncode, done.stderr) == (1, f"error: {path}: {message}\n")
