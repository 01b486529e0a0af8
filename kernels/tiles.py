"""Device functions on tiles of ``[BLOCK_W, BLOCK_C]``: columns of one row, by channels.

A thread holds four neighbouring channels of a column (8 bytes of a 16-bit type, 16 of float32) and, in a tuple, the
same place of ROWS rows below one another. So one load of a row feeds every output row whose window covers it:
``k * (ROWS + k - 1) / ROWS`` loads an output instead of ``k * k``. Triton cannot index a tensor in registers, hence
tuples of tiles and not one three-dimensional tile.
"""

import triton
import triton.language as tl

# The interpreter runs the same code with numpy: it is slow to call a device function, and it cuts bfloat16 off.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def gelu_tail(a):
    """Phi(-2a) for 0 <= a <= 3, as the fourth power of a polynomial: erfc falls off too fast for one of its own."""
    p = tl.full(a.shape, 6.64604377e-05, tl.float32)
    p = tl.fma(p, a, -0.000595438119)
    p = tl.fma(p, a, 0.00115083903)
    p = tl.fma(p, a, 0.00463459641)
    p = tl.fma(p, a, -0.0186437592)
    p = tl.fma(p, a, -0.00440399908)
    p = tl.fma(p, a, 0.0733016878)
    p = tl.fma(p, a, 0.0440580286)
    p = tl.fma(p, a, -0.238775462)
    p = tl.fma(p, a, -0.398940265)
    p = tl.fma(p, a, 1.0)
    p = p * p
    return p * p


@triton.jit
def gelu(z):
    """Exact (erf) GELU to 2.6e-7: ``max(z, 0) - |z| Phi(-|z|)``, ten multiply-adds, no division, no exponential."""
    half = 0.5 * z
    a = tl.minimum(tl.abs(half), 3.0)
    return tl.fma(-a, gelu_tail(a), half + tl.abs(half))


@triton.jit
def gelu_and_grad(z):
    """GELU(z) and its derivative ``1/2 +- (1/2 - Phi(-|z|) + |z| phi(|z|))``, to 2.6e-7 and 2.0e-7."""
    half = 0.5 * z
    a = tl.minimum(tl.abs(half), 3.0)
    tail = gelu_tail(a)
    s = a * a
    p = tl.full(a.shape, 1.8670379e-08, tl.float32)
    p = tl.fma(p, s, -7.53876293e-07)
    p = tl.fma(p, s, 1.49196094e-05)
    p = tl.fma(p, s, -0.000200233611)
    p = tl.fma(p, s, 0.00205828808)
    p = tl.fma(p, s, -0.0165465102)
    p = tl.fma(p, s, 0.0993379876)
    p = tl.fma(p, s, -0.397371233)
    p = tl.fma(p, s, 0.794744432)
    p = p * p
    rise = tl.fma(a + a, p * p, tl.fma(tail, -0.5, 0.5))
    return tl.fma(-a, tail, half + tl.abs(half)), 0.5 + tl.where(half < 0, -rise, rise)


@triton.jit
def row_pointer(plane, row, row_pitch, RING: tl.constexpr):
    """First element of a row: of a whole plane (RING 0), or of a ring that keeps the last RING rows."""
    if RING > 0:
        row = row % RING
    return plane + row.to(tl.int64) * row_pitch


@triton.jit
def zero_tiles(ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(ROWS):
        tiles = tiles + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    return tiles


@triton.jit
def columns_of_row(columns, row, low, high, width):
    """Which columns lie inside the map, none where the row is not in low .. high - 1."""
    limit = tl.where((row >= low) & (row < high), width, 0)
    return (columns >= 0) & (columns < limit)


@triton.jit
def conv_tiles(
    plane,
    row_pitch,
    pixel_pitch,
    weights,
    row0,
    column0,
    height,
    width,
    in_channels,
    RING: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows of a depthwise convolution, from row0 and column0. ``weights`` is [KH * KW, BLOCK_C], float32.

    The loop over the columns of the kernel stays a loop: unrolled, a 15 x 15 kernel would not fit the instruction
    cache. The transposed convolution is the same walk with the taps taken from the other end.
    """
    channels = tl.arange(0, BLOCK_C)
    columns = column0 + tl.arange(0, BLOCK_W)
    acc = zero_tiles(ROWS, BLOCK_W, BLOCK_C)
    for kx in range(KW):
        x = columns + (kx - KW // 2)
        offsets = x[:, None] * pixel_pitch + channels[None, :]
        first_tap = weights + kx * BLOCK_C
        if TRANSPOSED:
            first_tap = weights + (KW - 1 - kx) * BLOCK_C
        taps = ()
        for i in tl.static_range(ROWS + KH - 1):
            row = row0 + (i - KH // 2)
            kept_row = row % RING if RING > 0 else row
            limit = tl.where((row >= 0) & (row < height), width, 0)
            inside = ((x >= 0) & (x < limit))[:, None] & in_channels[None, :]
            source = plane + kept_row.to(tl.int64) * row_pitch + offsets
            value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            if i < KH:
                tap = tl.load(first_tap + (KH - 1 - i if TRANSPOSED else i) * (KW * BLOCK_C) + channels)
                taps = taps + (tl.broadcast_to(tap[None, :], (BLOCK_W, BLOCK_C)),)
            grown = ()
            for r in tl.static_range(ROWS):
                if i >= r and i - r < KH:
                    grown = grown + (tl.fma(taps[i - r], value, acc[r]),)
                else:
                    grown = grown + (acc[r],)
            acc = grown
    return acc


@triton.jit
def pack_weights(
    packed,
    weight,
    channel0,
    C: tl.constexpr,
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
