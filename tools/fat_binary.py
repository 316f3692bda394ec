"""Show what machine code a CUDA library holds by GPU architecture, or copy it with that of one architecture alone.

    python tools/fat_binary.py libtransformer_engine.so                    # the table
    python tools/fat_binary.py libtransformer_engine.so COPY.so --keep 90  # for an H100 or H200

A linked library holds fat binaries: lists of entries, each machine code or PTX for one architecture. The copy has the file's
size and layout, with zeros where other entries were, which any compressor drops: Transformer Engine 2.11 comes from 463 MB to
8.4 MB. (NVIDIA's nvprune takes relocatable objects only.) No PTX is kept, so the copy runs on that architecture and no other.

Needs nothing but Python: `tools/gpu_bundle.sh` runs it with one that has none of the product's packages.
"""

import argparse
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from mmap import ACCESS_READ, ACCESS_WRITE, mmap
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
MACHINE_CODE, PTX = 2, 1
_BINARY = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of the entries."""
_ENTRY = struct.Struct("<HHIQIIHHI")
"""Kind, version, bytes of its header, bytes of its payload, three numbers unused here, minor version, architecture."""
_LEAST_HEADER, _MOST_HEADER = 64, 4096
_FILE_HEADER, _SECTION_TABLE_AT, _SECTION_SIZES_AT = 64, 40, 58
_SECTION = struct.Struct("<IIQQQQIIQQ")


class Entry(NamedTuple):
    """One entry of a fat binary; offsets and sizes in bytes."""

    start: int
    header: int
    payload: int
    kind: int
    architecture: int
    """As 90; code that uses what only this chip has (sm_90a) has the same number."""

    @property
    def end(self) -> int:
        """Where the next entry begins."""
        return self.start + self.header + self.payload


class FatBinary(NamedTuple):
    """One fat binary; offsets in bytes."""

    start: int
    entries_start: int
    end: int
    entries: list[Entry]


def fat_binaries(library: mmap | bytes) -> Iterator[FatBinary]:
    """Yield the fat binaries of an ELF file.

    Raises:
        ValueError: the file is not a 64-bit ELF file.
    """
    for offset, size in _sections(library):
        position, end = offset, offset + size
        while position + _BINARY.size <= end:
            magic, _, header, length = _BINARY.unpack_from(library, position)
            if magic != MAGIC:  # padding
                position += 8
                continue
            first, last = position + header, position + header + length
            yield FatBinary(position, first, last, list(_entries(library, first, last)))
            position = (last + 7) & ~7


def _entries(library: mmap | bytes, position: int, end: int) -> Iterator[Entry]:
    while position + _LEAST_HEADER <= end:
        kind, _, header, payload, *_, architecture = _ENTRY.unpack_from(library, position)
        if not _LEAST_HEADER <= header <= _MOST_HEADER:
            return
        yield (entry := Entry(position, header, payload, kind, architecture))
        position = entry.end


def _sections(library: mmap | bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the sections that hold fat binaries."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF library")
    (table,) = struct.unpack_from("<Q", library, _SECTION_TABLE_AT)
    size, count, names = struct.unpack_from("<HHH", library, _SECTION_SIZES_AT)
    sections = [_SECTION.unpack_from(library, table + index * size) for index in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, length, *_ in sections:
        if library[strings + name : library.find(b"\0", strings + name)] in SECTIONS:
            yield offset, length


def keep(library: mmap | bytearray, architecture: int) -> int:
    """Drop every entry that is not machine code of this architecture, in place, and return the bytes that became zeros.

    Entries that stay move to the front of their fat binary. One of which nothing would stay keeps its headers, because it is
    registered all the same when the library is loaded.
    """
    dropped = 0
    for binary in list(fat_binaries(library)):
        kept = [e for e in binary.entries if e.kind == MACHINE_CODE and e.architecture == architecture]
        if not kept:
            for entry in binary.entries:
                library[entry.start + entry.header : entry.end] = bytes(entry.payload)
                dropped += entry.payload
            continue
        content = b"".join(library[entry.start : entry.end] for entry in kept)
        gone = binary.end - binary.entries_start - len(content)
        library[binary.entries_start : binary.end] = content + bytes(gone)
        struct.pack_into("<Q", library, binary.start + _BINARY.size - 8, len(content))
        dropped += gone
    return dropped


def table(library: mmap | bytes) -> str:
    """Return a line for each kind and architecture: how many entries, and their MiB."""
    counts, sizes = Counter(), Counter()
    for binary in fat_binaries(library):
        for entry in binary.entries:
            what = ("PTX" if entry.kind == PTX else "code", entry.architecture)
            counts[what] += 1
            sizes[what] += entry.payload
    return "\n".join(
        f"{kind:5} sm_{sm:<4} {counts[kind, sm]:5} × {sizes[kind, sm] / 2**20:9.2f} MiB" for kind, sm in sorted(counts)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("copy", type=Path, nargs="?", help="with --keep: where the copy goes")
    parser.add_argument("--keep", type=int, metavar="SM", help="architecture whose code the copy keeps: 90")
    arguments = parser.parse_args()
    if (arguments.copy is None) != (arguments.keep is None):
        parser.error("COPY and --keep go together")
    try:
        if arguments.copy is None:
            with arguments.library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as library:
                print(table(library))
            return
        shutil.copyfile(arguments.library, arguments.copy)
        with arguments.copy.open("r+b") as file, mmap(file.fileno(), 0, access=ACCESS_WRITE) as library:
            dropped = keep(library, arguments.keep)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {arguments.library}: {getattr(error, 'strerror', None) or error}\n")
    print(f"{arguments.copy}: {dropped / 2**20:.1f} MiB of other architectures are zeros")


if __name__ == "__main__":
    main()
