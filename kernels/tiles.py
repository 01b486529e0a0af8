"""Device functions on tiles ``[BLOCK_W, BLOCK_C]``: columns of one row, by channels.

    a thread             four neighbouring channels of one column (8 bytes of a 16-bit type, 16 of float32)
    a tuple of tiles     the same place of ROWS rows, one below the other
    a load of one row    feeds every output row whose window covers it: k (ROWS + k - 1) / ROWS loads an output,
                         where k k is what an output on its own would take

Triton cannot index a tensor in registers, hence tuples of tiles. Where rows are loaded, stored and gated they are one
tensor ``(ROWS * W, C)``, row after row: the same registers and instructions, but far fewer operations, and some passes
of the compiler take time that grows with their square. The tensor has two dimensions because versions of Triton
disagree on which of three the threads walk along first.

Parameters have one order everywhere: what is read and written, where (``row0``, ``column0``), the ``size`` of the map,
then the constants: the level's (``RING``, ``KH``, ``KW``) and the tile's (``ROWS``, ``BLOCK_W``, ``BLOCK_C``). Values
that go together are named tuples. Constants are not, since Triton 3.6 does not keep the fields of a tuple constant; so
their lists repeat from function to function.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# The interpreter runs the same code with numpy: it is slow to call a device function, and it cuts bfloat16 off.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Size(NamedTuple):
    """Of a map, in pixels."""

    height: tl.tensor
    width: tl.tensor


class Plane(NamedTuple):
    """Rows of pixels, of an image or of a ring: where they start, the pitches in elements, which channels exist."""

    start: tl.tensor
    row_pitch: tl.tensor
    pixel_pitch: tl.tensor
    in_channels: tl.tensor


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def widened(x):
    """Any float type to float32. Two bfloat16 of a register take two instructions; Triton's own conversion three."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def normal_tail(a, dtype: tl.constexpr):
    """Phi(-a) for 0 <= a <= 6 as 2 to a polynomial: exponentials have a unit of their own, which nothing else uses.

    Fitted to the smallest largest error of the tail and of a times the tail, which are GELU' and GELU: 1.4e-8 for
    float32, less than its rounding. Results of 16 bits take 1.2e-5, a twentieth of float16's rounding just below 1.
    """
    if dtype == tl.float32:
        p = tl.full(a.shape, -2.27609089e-06, tl.float32)
        p = tl.fma(p, a, 3.29706497e-05)
        p = tl.fma(p, a, -0.000157291496)
        p = tl.fma(p, a, -0.000202447236)
        p = tl.fma(p, a, 0.00714273809)
        p = tl.fma(p, a, -0.0525464029)
        p = tl.fma(p, a, -0.45919307)
        p = tl.fma(p, a, -1.15110694)
        p = tl.fma(p, a, -0.999999959)
    else:
        p = tl.full(a.shape, 0.00439388133, tl.float32)
        p = tl.fma(p, a, -0.0468233766)
        p = tl.fma(p, a, -0.463438708)
        p = tl.fma(p, a, -1.15010924)
        p = tl.fma(p, a, -1.00003378)
    return tl.exp2(p)


@triton.jit
def gelu(z, dtype: tl.constexpr):
    """Exact (erf) GELU for a result of ``dtype``: ``max(z, 0) - |z| Phi(-|z|)``, without a division."""
    a = tl.minimum(tl.abs(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(-a, normal_tail(a, dtype), tl.maximum(z, 0.0))


@triton.jit
def gelu_and_grad(z, dtype: tl.constexpr):
    """GELU(z) and its derivative ``Phi(z) + z phi(z)``, for results of ``dtype``."""
    a = tl.minimum(tl.abs(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    tail = normal_tail(a, dtype)
    density = tl.exp2(tl.fma(z * z, -0.72134752, -1.32574806))
    return tl.fma(-a, tail, tl.maximum(z, 0.0)), tl.fma(z, density, tl.where(z < 0, tail, 1 - tail))


@triton.jit
def rows_from(row0, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Numbers of the rows row0 .., (ROWS * W, 1)."""
    return row0 + tl.arange(0, ROWS * BLOCK_W)[:, None] // BLOCK_W


@triton.jit
def columns_from(column0, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Numbers of the columns column0 .. in each of some rows, (ROWS * W, 1)."""
    return column0 + tl.arange(0, ROWS * BLOCK_W)[:, None] % BLOCK_W


@triton.jit
def channels_of(BLOCK_C: tl.constexpr):
    """0 .. BLOCK_C - 1 as (1, C), four to a thread: without the hint, loads of 16-bit types would take eight."""
    return tl.max_contiguous(tl.arange(0, BLOCK_C), 4)[None, :]


@triton.jit
def row_pointer(plane, row, row_pitch, RING: tl.constexpr):
    """First element of a row: of a whole plane (RING 0), or of a ring that keeps the last RING rows."""
    if RING > 0:
        row = row % RING
    return plane + row.to(tl.int64) * row_pitch


@triton.jit
def load_gates(gates_plane, rows, columns, width, pixel_pitch, inside):
    """Gates of one level in float32, in the shape of rows and columns."""
    at = row_pointer(gates_plane, rows, width * pixel_pitch, 0) + columns * pixel_pitch
    return widened(tl.load(at, mask=inside, other=0.0))


@triton.jit
def zero_tiles(ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(ROWS):
        tiles = tiles + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    return tiles


@triton.constexpr_function
def part_size(first, count):
    """Size of the part at ``first`` of ``count`` rows: 8 as often as that goes, then 4, 2 and 1, as shapes must be."""
    size = 8
    while size > count - first:
        size //= 2
    return size


@triton.constexpr_function
def starts_part(row, count):
    """Whether a part begins at this row of ``count``."""
    first = 0
    while first < min(row, count):
        first += part_size(first, count)
    return first == row and row < count


@triton.jit
def tiles_of(rows, ROWS: tl.constexpr):
    """(ROWS * W, C) -> a tuple of ROWS tiles (W, C)."""
    BLOCK_W: tl.constexpr = rows.shape[0] // ROWS
    BLOCK_C: tl.constexpr = rows.shape[1]
    if ROWS == 2:
        rows = tl.permute(tl.reshape(rows, (2, BLOCK_W, BLOCK_C)), (1, 2, 0))
    elif ROWS == 4:
        rows = tl.permute(tl.reshape(rows, (2, 2, BLOCK_W, BLOCK_C)), (2, 3, 0, 1))
    elif ROWS == 8:
        rows = tl.permute(tl.reshape(rows, (2, 2, 2, BLOCK_W, BLOCK_C)), (3, 4, 0, 1, 2))
    tiles = (rows,)
    for level in tl.static_range(3):
        if (1 << level) < ROWS:
            even, odd = (), ()
            for i in tl.static_range(1 << level):
                first, second = tl.split(tiles[i])
                even = even + (first,)
                odd = odd + (second,)
            tiles = even + odd
    return tiles


@triton.jit
def rows_of(tiles, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """ROWS of the tiles (W, C), from FIRST on -> (ROWS * W, C)."""
    BLOCK_W: tl.constexpr = tiles[0].shape[0]
    BLOCK_C: tl.constexpr = tiles[0].shape[1]
    joined = ()
    for i in tl.static_range(ROWS):
        joined = joined + (tiles[FIRST + i],)
    for level in tl.static_range(3):
        if (1 << level) < ROWS:
            pairs = ()
            for i in tl.static_range(ROWS >> (level + 1)):
                pairs = pairs + (tl.join(joined[i], joined[i + (ROWS >> (level + 1))]),)
            joined = pairs
    rows = tl.reshape(joined[0], (BLOCK_W, BLOCK_C, ROWS))
    return tl.reshape(tl.permute(rows, (2, 0, 1)), (ROWS * BLOCK_W, BLOCK_C))


@triton.jit
def load_rows(
    plane,
    row0,
    column0,
    size,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows from row0 on, of a plane or of a ring of its rows: a tuple of tiles (W, C), zero outside the map."""
    rows, columns = rows_from(row0, ROWS, BLOCK_W), columns_from(column0, ROWS, BLOCK_W)
    # The half on rows is the same for all columns of a kernel, the half on columns for all rows: each is made once.
    inside = ((rows >= 0) & (rows < size.height)) & ((columns >= 0) & (columns < size.width) & plane.in_channels)
    source = row_pointer(plane.start, rows, plane.row_pitch, RING) + (
        columns * plane.pixel_pitch + channels_of(BLOCK_C)
    )
    return tiles_of(widened(tl.load(source, mask=inside, other=0.0)), ROWS)


@triton.jit
def load_taps(first_tap, PITCH: tl.constexpr, TAPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """TAPS taps that lie PITCH apart: a tuple of tiles (W, C), the same for all columns."""
    return tiles_of(tl.load(first_tap + (rows_from(0, TAPS, BLOCK_W) * PITCH + channels_of(BLOCK_C))), TAPS)


@triton.jit
def conv_tiles(
    plane,
    weights,
    row0,
    column0,
    size,
    RING: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows of a depthwise convolution, from row0 on. ``weights`` is [KH * KW, BLOCK_C], float32.

    The loop over the columns of the kernel stays a loop: unrolled, a 15 x 15 kernel would not fit the instruction
    cache. The transposed convolution is the same walk with the taps taken from the other end.
    """
    acc = zero_tiles(ROWS, BLOCK_W, BLOCK_C)
    TAP_PITCH: tl.constexpr = -KW * BLOCK_C if TRANSPOSED else KW * BLOCK_C
    ROWS_READ: tl.constexpr = ROWS + KH - 1
    for kx in range(KW):
        first_tap = weights + kx * BLOCK_C
        if TRANSPOSED:
            first_tap = weights + (KH * KW - 1 - kx) * BLOCK_C
        values, taps = (), ()
        for i in tl.static_range(ROWS_READ):
            if starts_part(i, ROWS_READ):
                values = values + load_rows(
                    plane, row0 + (i - KH // 2), column0 + (kx - KW // 2), size,
                    RING, part_size(i, ROWS_READ), BLOCK_W, BLOCK_C,
                )  # fmt: skip
            if starts_part(i, KH):
                taps = taps + load_taps(first_tap + i * TAP_PITCH, TAP_PITCH, part_size(i, KH), BLOCK_W, BLOCK_C)
            acc = add_products(acc, taps, values[i], i, ROWS, KH)
    return acc


@triton.jit
def add_products(sums, factors, values, AT: tl.constexpr, SUMS: tl.constexpr, FACTORS: tl.constexpr):
    """sums[j] += factors[AT - j] * values, for every j of SUMS for which there is such a factor: a step of a
    correlation, whichever of the two it is along."""
    grown = ()
    for j in tl.static_range(SUMS):
        if j <= AT and AT - j < FACTORS:
            grown = grown + (tl.fma(factors[AT - j], values, sums[j]),)
        else:
            grown = grown + (sums[j],)
    return grown


@triton.jit
def ring_of(rings, FIRST: tl.constexpr, size, WHOLE_PLANE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The ring that starts at row FIRST of the program's scratch ``rings``, or the plane of that number."""
    start = rings.start + FIRST * (size.height if WHOLE_PLANE else 1) * rings.row_pitch
    return Plane(start, rings.row_pitch, BLOCK_C, rings.in_channels)


@triton.jit
def pack_weights(
    packed,
    weight,
    channel0,
    C,
    TAPS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """weight (C, 1, kh, kw) of BLOCK_C channels -> packed [TAPS, BLOCK_C] in float32: one vector load a tap later."""
    channels = tl.arange(0, BLOCK_C)
    for first in range(0, TAPS, BLOCK_TAPS):
        taps = first + tl.arange(0, BLOCK_TAPS)
        inside = (taps < TAPS)[:, None] & (channel0 + channels < C)[None, :]
        values = tl.load(weight + (channel0 + channels)[None, :] * TAPS + taps[:, None], mask=inside, other=0.0)
        here = (taps < TAPS)[:, None] & (channels < BLOCK_C)[None, :]
        tl.store(packed + taps[:, None] * BLOCK_C + channels[None, :], values.to(tl.float32), mask=here)
