"""The constants that a compiler keeps beside a kernel's code, bank 2 of a cubin: jump tables and large numbers."""

from __future__ import annotations

import struct

_SECTION = struct.Struct("<IIQQQQIIQQ")


def sections(cubin: bytes) -> dict[str, bytes]:
    """The sections of an ELF file of 64 bits, by name."""
    (first,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [_SECTION.unpack_from(cubin, first + size * index) for index in range(count)]
    where = heads[names][4]
    found = {}
    for head in heads:
        start = where + head[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        found[name] = cubin[head[4] : head[4] + head[5]]
    return found


def constants(cubin: bytes, kernel: str) -> bytes:
    """Bank 2 of ``kernel``; empty if it has none."""
    return sections(cubin).get(f".nv.constant2.{kernel}", b"")
