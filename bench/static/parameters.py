"""Where the parameters of a kernel lie, by the head of its PTX, and their bytes for a launch."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+(?:\.ptr[^,)]*?\s)?([\w$]+)(?:\[(\d+)\])?\s*(?=[,)])")


def layout(ptx: str, kernel: str | None = None) -> list[tuple[int, int]]:
    """(offset, bytes) of each parameter of ``kernel``, or of the only one.

    Raises:
        ValueError: the PTX has no such kernel.
    """
    found = re.search(rf"\.entry\s+{kernel or '[^(]*?'}\s*(\([^{{]*?\))\s*[.{{]", ptx, re.DOTALL)
    if found is None:
        raise ValueError(f"kernel: the PTX has no entry {kernel!r}")
    places, end = [], 0
    for align, bits, _, count in _PARAMETER.findall(found[1]):
        size = int(bits) // 8 * int(count or 1)
        first = -(-end // (step := int(align or int(bits) // 8))) * step
        places.append((first, size))
        end = first + size
    return places


def packed(places: Sequence[tuple[int, int]], values: Sequence[bytes]) -> bytes:
    """The parameters of a launch as they lie in constant memory.

    Raises:
        ValueError: there are other parameters than values, or of other sizes.
    """
    if [size for _, size in places] != [len(value) for value in values]:
        raise ValueError(f"values: sizes {[len(one) for one in values]}, the kernel takes {[size for _, size in places]}")
    data = bytearray(places[-1][0] + places[-1][1] if places else 0)
    for (first, size), value in zip(places, values, strict=True):
        data[first : first + size] = value
    return bytes(data)
