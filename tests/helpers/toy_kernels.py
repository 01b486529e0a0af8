"""Small Triton kernels with known memory traffic, to test the tools that count traffic and compile kernels."""

import triton
import triton.language as tl


@triton.jit
def reverse_twice_kernel(x, scratch, y, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Each program reverses a block through scratch. Threads read what other threads wrote, so they need a barrier."""
    first = tl.program_id(0) * BLOCK
    forth = first + tl.arange(0, BLOCK)
    tl.store(scratch + forth, tl.load(x + forth, mask=forth < n), mask=forth < n)
    if BARRIER:
        tl.debug_barrier()
    back = first + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(y + back, 2 * tl.load(scratch + back, mask=back < n), mask=back < n)


@triton.jit
def sum_neighbours_kernel(x, y, n, BLOCK: tl.constexpr):
    """y[i] = x[i] + x[i + 1]: neighbours overlap inside a program, and by one element between programs."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i + 1, mask=i + 1 < n, other=0.0))


@triton.jit
def shared_output_kernel(y):
    """Every program stores to the same address, in no defined order."""
    tl.store(y, tl.program_id(0))


@triton.jit
def many_registers_kernel(x, y, BLOCK: tl.constexpr):
    """Holds two blocks at once, so a large block does not fit into registers."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(x + BLOCK + i)
    tl.debug_barrier()
    tl.store(y + i, tl.cumsum(a) + tl.flip(b))


@triton.jit(do_not_specialize=["n", "inner"])
def walk_kernel(x, y, n, inner, BLOCK: tl.constexpr):
    """Every program walks over its share of the blocks and multiplies and adds each ``inner`` times."""
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0)
        total = value
        for _ in range(inner):
            total = tl.fma(total, value, value)
            tl.debug_barrier()
        tl.store(y + at, total, mask=at < n)
