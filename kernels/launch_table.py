"""Which tile a kernel takes for which sizes: tables for the levels, the matrix products and the kernels on rows.

A thread of a level's tile holds four channels, so ``num_warps = block_w * block_c / 128``. Wide maps get few channels
a program, since the rings of all resident programs should stay in L2. Narrow maps get many, which fills the warps, as
long as there are images enough to give every processor a program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .plan import Device


@dataclass(frozen=True)
class LevelConfig:
    """Tile of the level kernels: columns, channels, and rows that a thread holds, forward and backward.

    ``step``: rows that a level of the backward works on between two barriers, where the program streams over rows.
    ``whole_plane``: the program does not stream; a level works on all rows before the next one begins.
    How the work is divided: ``programs_per_sm`` that are resident at once, ``chunks`` that the batch is cut into,
    ``bands`` of rows of a plane, ``splits`` of the rows that the gradient of the modulator's weight is summed over;
    0: as many as the device is filled with.
    """

    block_w: int
    block_c: int
    rows: int = 8
    back_rows: int = 8
    step: int = 8
    whole_plane: bool = False
    programs_per_sm: int = 2
    chunks: int = 0
    bands: int = 0
    splits: int = 0

    @property
    def num_warps(self) -> int:
        return max(1, self.block_w * self.block_c // 128)

    def registers(self, rows: int) -> int | None:
        """Register limit of a thread that holds ``rows`` rows; None: no limit.

        Without one, ptxas spills a few registers to fit one more program on a multiprocessor, although none is
        launched. With eight rows a thread needs too many registers for that.
        """
        return min(255, 2048 // self.num_warps) if rows < 8 else None


@dataclass(frozen=True)
class ProductConfig:
    """Tile of a matrix product. Its programs walk over the rows; there are as many as are resident at once."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def programs_per_sm(self) -> int:
        return max(1, 8 // self.num_warps)

    def shared_bytes(self, itemsize: int, arch: int) -> int:
        """Shared memory of a program, at most: steps of both operands in flight, and the result's way to its store.

        Tensor cores of data center GPUs since Hopper read a step where it lies while the next ones arrive; others
        copy it to registers first and need one step less.
        """
        steps = self.num_stages if 90 <= arch < 120 else self.num_stages - 1
        step = (self.block_m + self.block_n) * self.block_k
        return (steps * step + self.block_m * self.block_n) * itemsize + 1024


@dataclass(frozen=True)
class RowConfig:
    """Tile of the kernels on whole rows of channels. Eight elements a thread: one load of 16 bytes in 16 bit."""

    rows: int
    block_c: int
    num_warps: int
    programs_per_sm: int

    @property
    def registers(self) -> int:
        """Of a thread, where so many programs share the 65536 of a multiprocessor."""
        return 65536 // (32 * self.num_warps * self.programs_per_sm)


# (largest width, configuration)
LEVELS = (
    (8, LevelConfig(8, 64)),
    (16, LevelConfig(16, 32)),
    (24, LevelConfig(8, 64)),
    (48, LevelConfig(16, 32)),
    (1 << 30, LevelConfig(32, 16)),
)
# Maps of at most so many rows are worked level by level. In higher ones than LOW_PLANE_ROWS, processors before Hopper
# would spill, and so would MANY_LEVELS. Where planes are too few for the device only low maps are worked so, since
# bands would not help those.
WHOLE_PLANE_ROWS = 64
LOW_PLANE_ROWS = 32
FEW_PLANES_ROWS = 16
MANY_LEVELS = 4
FLOAT16_ROWS_OF_MANY_LEVELS = 4
# Channels of the narrowest tile, for few images; twice as many before Hopper and where there are MANY_LEVELS.
NARROWEST = 16

ANY = 1 << 30
FLOAT16, FLOAT32, BFLOAT16 = (torch.float16,), (torch.float32,), (torch.bfloat16,)
HALVES = (torch.bfloat16, torch.float16)
# (largest kernel of any level, dtypes, most channels of a tile, rows, back_rows). A thread must hold in registers a
# column of taps, the rows that it is multiplied with and what else lives through a level: larger kernels leave room
# for fewer rows. float16 needs a few registers more than bfloat16, which is the upper half of a float32. Where no row
# of this table allows a tile of LEVELS, the next tile there that one does allow is taken.
ROWS = (
    (7, FLOAT16, 16, 8, 2),
    (9, HALVES, ANY, 8, 4),
    (7, FLOAT32, ANY, 8, 2),
    (9, FLOAT32, ANY, 4, 2),
    (11, HALVES, ANY, 8, 4),
    (11, FLOAT32, ANY, 4, 2),
    (13, HALVES, ANY, 4, 2),
    (15, HALVES, 16, 8, 4),
    (15, FLOAT32, 16, 4, 4),
)
# (largest kernel, dtypes, oldest architecture, whole planes alone, back_rows) where more rows fit the registers.
MORE_BACK_ROWS = ((5, BFLOAT16, 90, False, 8), (7, BFLOAT16, 90, True, 8))

FORWARD, BACKWARD = "forward", "backward"
# (bytes of an element, largest number of channels, configuration): the first row that fits the device. Every group of
# programs reads all of W, from the L2; processors without a program would cost more. Narrow slabs make more programs
# with as few bytes.
PRODUCTS = {
    FORWARD: (
        (2, 64, ProductConfig(128, 64, 32, 4, 3)),
        (2, 448, ProductConfig(128, 128, 64, 8, 3)),
        (2, 1 << 30, ProductConfig(256, 64, 64, 8, 3)),
        (2, 1 << 30, ProductConfig(128, 128, 64, 8, 3)),  # where the shared memory is 99 KB
        (4, 1 << 30, ProductConfig(64, 64, 32, 4, 2)),
    ),
    BACKWARD: (
        (2, 64, ProductConfig(128, 64, 32, 4, 3)),
        (2, 1 << 30, ProductConfig(128, 64, 64, 8, 4)),
        # A step's sum has registers of its own: of 32 it would spill.
        (4, 1 << 30, ProductConfig(64, 64, 16, 4, 3)),
    ),
}


def level_config(
    height: int,
    width: int,
    channels: int,
    kernel_heights: tuple[int, ...],
    dtype: torch.dtype,
    batch: int = ANY,
    device: Device | None = None,
) -> LevelConfig:
    """The rows of the tables for such a map and such kernels; few channels make a narrower tile.

    So do few images: tiles become narrower until every processor of the ``device`` has one, or a tile is two warps.
    Without a device the choice is that of an H100 with work enough.
    """
    config = next(
        config
        for widest, config in LEVELS
        if width <= widest and _rows(kernel_heights, dtype, config.block_c) is not None
    )
    processors, arch = (device.sm_count, device.arch) if device else (1, 90)
    block_c = min(config.block_c, max(8, _power_of_two(channels)))
    fills = 2 * batch * -(-channels // block_c) > processors
    whole_plane = height <= _whole_plane_rows(arch, len(kernel_heights), fills)
    narrowest = 2 * NARROWEST if arch < 90 or len(kernel_heights) >= MANY_LEVELS else NARROWEST
    while block_c > narrowest and config.block_w * block_c > 256 and batch * -(-channels // block_c) < processors:
        block_c //= 2
    rows, back_rows = _rows(kernel_heights, dtype, block_c)
    if dtype in FLOAT16 and len(kernel_heights) >= MANY_LEVELS:
        rows = min(rows, FLOAT16_ROWS_OF_MANY_LEVELS)
    for tallest, dtypes, oldest, whole_planes_alone, more in MORE_BACK_ROWS:
        if max(kernel_heights) <= tallest and dtype in dtypes and arch >= oldest and whole_plane >= whole_planes_alone:
            back_rows = more
    return replace(
        config,
        block_c=block_c,
        rows=min(rows, config.rows),
        back_rows=min(back_rows, config.back_rows),
        whole_plane=whole_plane,
    )


def backward_would_spill(kernel_heights: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether no tile leaves a thread registers enough: float32, three levels and more, the largest kernels."""
    return dtype in FLOAT32 and len(kernel_heights) > 2 and max(kernel_heights) > 11


def _rows(kernel_heights: tuple[int, ...], dtype: torch.dtype, block_c: int) -> list[int] | None:
    """(rows, back_rows) of a tile of so many channels; None: it is too wide."""
    return next(
        (
            rows
            for tallest, dtypes, most, *rows in ROWS
            if max(kernel_heights) <= tallest and dtype in dtypes and block_c <= most
        ),
        None,
    )


def _whole_plane_rows(arch: int, levels: int, planes_fill_the_device: bool) -> int:
    """The highest map that is worked level by level."""
    spills = arch < 90 or levels >= MANY_LEVELS
    rows = min(LOW_PLANE_ROWS, WHOLE_PLANE_ROWS) if spills else WHOLE_PLANE_ROWS
    return rows if planes_fill_the_device else min(FEW_PLANES_ROWS, rows)


def level_candidates(
    height: int, width: int, channels: int, kernel_heights: tuple[int, ...], dtype: torch.dtype
) -> list[LevelConfig]:
    """What autotuning tries: the tables' choice first, then others close to it."""
    first = level_config(height, width, channels, kernel_heights, dtype)
    found = [first]
    for block_w, block_c in ((8, 64), (16, 32), (32, 16), (32, 32), (64, 16)):
        for rows in (4, 8):
            candidate = replace(first, block_w=block_w, block_c=min(block_c, first.block_c * 2), rows=rows)
            if candidate not in found and block_w < 2 * max(width, 8):
                found.append(candidate)
    found += [replace(first, chunks=chunks) for chunks in (2, 4)]
    found += [replace(first, programs_per_sm=programs) for programs in (1, 4)]
    return found


def product_config(direction: str, channels: int, dtype: torch.dtype, device: Device) -> ProductConfig:
    """The first row of the table for a product of (rows, channels) by (channels, channels) that fits the device."""
    rows = [c for itemsize, most, c in PRODUCTS[direction] if itemsize >= dtype.itemsize and channels <= most]
    size = max(16, _power_of_two(channels))
    for config in rows:
        # The largest step that divides the channels, so that no load needs a mask; a masked one where none does.
        step = next((k for k in (64, 32, 16) if k <= config.block_k and channels % k == 0), min(config.block_k, size))
        config = replace(config, block_n=min(config.block_n, size), block_k=step)
        if config.shared_bytes(dtype.itemsize, device.arch) <= device.shared_bytes:
            break
    return config


def weight_product_config(channels: int, dtype: torch.dtype) -> ProductConfig:
    """The tile of dW, summed over rows: block_m by block_n channels, block_k rows at a time."""
    size = max(16, _power_of_two(channels))
    largest = 64 if dtype.itemsize == 4 or channels <= 64 else 128
    # Eight warps in float32 too: with four, a thread holds so much of the tile that registers spill.
    return ProductConfig(min(largest, size), min(largest, size), 32, 4 if channels <= 64 else 8, 3)


# (largest number of channels, elements of a tile)
ROW_TILES = ((2048, 2048), (4096, 4096))
# Every program reads the parameters, and in backward writes sums of its own. So there are only as many as it takes to
# keep the memory busy.
ROW_PROGRAMS_PER_SM = {"forward": 4, "backward": 2}


def row_config(channels: int, backward: bool) -> RowConfig:
    """The row of the table for rows of so many channels, at most 4096."""
    elements = next(elements for largest, elements in ROW_TILES if channels <= largest)
    block_c = _power_of_two(channels)
    rows = elements // block_c
    programs = ROW_PROGRAMS_PER_SM["backward" if backward else "forward"]
    return RowConfig(rows, block_c, elements // 256, programs * 2048 // elements)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
