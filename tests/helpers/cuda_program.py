"""The kernels of csrc/cuda as a program for the CPU (cuda_on_cpu/), and one call of it: operands in, results out."""

import concurrent.futures
import os
import shlex
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
CUDA = TESTS.parent / "csrc" / "cuda"
SOURCES = [
    *sorted(CUDA.glob("*.cu")),
    CUDA / "plan.cpp",
    CUDA / "toeplitz_plan.cpp",
    TESTS / "cuda" / "cuda_on_cpu" / "main.cpp",
]
# -fno-strict-aliasing: the kernels read a pair of elements as one word, which CUDA allows and standard C++ does not.
FLAGS = "-O1 -g1 -std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing"
SANITIZERS = "-fsanitize=address,alignment,integer-divide-by-zero,signed-integer-overflow -fno-sanitize-recover=all"

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Device:
    """Shared memory a block may have, and a multiprocessor has, in KiB; multiprocessors."""

    shared_per_block: int
    shared_per_multiprocessor: int
    multiprocessors: int

    def numbers(self):
        return [1024 * self.shared_per_block, 1024 * self.shared_per_multiprocessor, self.multiprocessors]


SM_80 = Device(163, 164, 108)
SM_86 = Device(99, 100, 84)
SM_90 = Device(227, 228, 132)


def compile_sources(folder, sources=SOURCES, linked=SOURCES):
    """Compile ``sources`` and link the program of ``linked``; the folder must already hold the other objects."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = [*shlex.split(FLAGS), *shlex.split(SANITIZERS), f"-I{TESTS / 'cuda' / 'cuda_on_cpu'}", f"-I{CUDA}"]

    def compile_one(source):
        run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.name}.o")])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    objects = [str(folder / f"{source.name}.o") for source in linked]
    run([*compiler, *shlex.split(SANITIZERS), *objects, "-o", str(folder / "kernels")])
    return folder / "kernels"


def run(command):
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr[-8000:]}"
    return result.stdout


def raw(tensor):
    """The bytes of a tensor's elements, in the order of its shape."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def storage_of(*views):
    """The elements that the views of one storage lie in, as one flat tensor."""
    storage = views[0].untyped_storage()
    assert all(view.untyped_storage().data_ptr() == storage.data_ptr() for view in views)
    return torch.empty(0, dtype=views[0].dtype).set_(storage)


def layout(view, size):
    return [size, view.storage_offset(), *view.stride()[:3]]


def case(numbers):
    return struct.pack(f"<{len(numbers)}q", *numbers)


@dataclass(frozen=True)
class Cut:
    """How a launch cuts the maps; ``fits`` on the device."""

    what: str  # "forward" or "backward"
    block_c: int
    tile_h: int
    tile_w: int
    threads: int
    shared_bytes: int
    fits: bool


def plan(program, folder, shape, dtype, device, tensor_cores=False):
    """(path of forward, path of backward, cuts of their launches) for a contiguous problem of this shape."""
    (folder / "case").write_bytes(_without_tensors(0, shape, dtype, device, tensor_cores))
    forward, backward, *cuts = run([str(program), str(folder / "case")]).splitlines()
    fields = (line.split() for line in cuts)
    return forward, backward, [Cut(what, *map(int, rest[:-1]), rest[-1] == "1") for what, *rest in fields]


def grids(program, folder, shape, dtype, device, tensor_cores=False):
    """Blocks of every launch of backward, with agg once more, for a contiguous problem of this shape."""
    (folder / "case").write_bytes(_without_tensors(1, shape, dtype, device, tensor_cores))
    _, *launches = run([str(program), str(folder / "case"), "-", "launches"]).splitlines()
    return [int(line.split()[1]) for line in launches]


def _without_tensors(operation, shape, dtype, device, tensor_cores):
    numbers = [operation, 0, ELEMENTS[dtype], shape.batch, shape.height, shape.width, shape.channels]
    numbers += [len(shape.kernels), 0, int(tensor_cores), *device.numbers(), *[0] * 15]
    for sizes in shape.kernel_sizes:
        numbers += sizes
    return case([*numbers, 1, 1, 1, 1])


def call(
    program,
    folder,
    ctx,
    gates,
    focal_weights,
    normalize,
    dagg=None,
    mask=(True,) * 4,
    device=SM_90,
    seed=0,
    tensor_cores=False,
    gradient_pitch=0,
    planar=False,
):
    """(path taken, outputs): agg, or with ``dagg`` what ``mask`` wants of [dctx, dgates, agg, *dfocal_weights].

    With ``gradient_pitch`` dctx and dgates are written into a packed gradient (B, H, W, pitch), behind C elements of a
    row for dq. It takes their places in the list, and what is not written is NaN. ``planar``: dagg is given, and agg
    written, as a matrix (C, B * H * W).
    """
    packed = storage_of(ctx, gates)
    dagg = dagg.permute(3, 0, 1, 2).contiguous() if planar else dagg
    dout = ctx.new_empty(ctx.shape) if dagg is None else dagg
    numbers = [int(dagg is not None), seed, ELEMENTS[ctx.dtype], *ctx.shape, len(focal_weights), int(normalize)]
    numbers += [int(tensor_cores)]
    numbers += device.numbers()
    numbers += [*layout(ctx, packed.numel()), *layout(gates, packed.numel()), *layout(dout, storage_of(dout).numel())]
    for weight in focal_weights:
        numbers += weight.shape[2:]
    numbers += [*map(int, mask), gradient_pitch, int(planar)]
    data = case(numbers) + raw(packed) + b"".join(map(raw, focal_weights))
    if dagg is not None:
        data += raw(storage_of(dagg))
    (folder / "case").write_bytes(data)
    path, conflicts = run([str(program), str(folder / "case"), str(folder / "result")]).splitlines()
    assert conflicts == "0", f"{conflicts} bank conflicts in ldmatrix"
    outputs = [ctx.shape]
    if dagg is not None:
        wanted = [*mask[:3], *[mask[3]] * len(focal_weights)]
        shapes = [ctx.shape, gates.shape, ctx.shape, *(weight.shape for weight in focal_weights)]
        outputs = [shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True)]
        if gradient_pitch:
            outputs[:2] = [(*ctx.shape[:3], gradient_pitch)]
    made = results(folder, ctx.dtype, outputs)
    if planar and mask[2]:
        place = 1 if gradient_pitch else 2
        made[place] = made[place].flatten().view(dagg.shape).permute(1, 2, 3, 0)
    return path, made


def results(folder, dtype, shapes):
    """The tensors that the program wrote."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    data = bytearray((folder / "result").read_bytes())
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    assert flat.numel() == sum(counts)
    return [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]


def modulate(program, folder, a, b, out=None, want_sum=False, multiprocessors=132, seed=0):
    """(the storage of a * b, its sum over the rows or nothing, (launches, blocks of the last one)), for rows (n, C).

    ``out`` says how the product lies in a storage of its own; without it the product replaces ``a``.
    """
    place = a if out is None else out
    numbers = [2, seed, ELEMENTS[a.dtype], *a.shape, multiprocessors, int(want_sum), int(out is None)]
    for rows in (a, b, place):
        numbers += [storage_of(rows).numel(), rows.storage_offset(), rows.stride(0)]
    (folder / "case").write_bytes(case(numbers) + raw(storage_of(a)) + raw(storage_of(b)))
    counts = run([str(program), str(folder / "case"), str(folder / "result")]).split()
    shapes = [(storage_of(place).numel(),), (a.shape[1] * want_sum,)]
    return *results(folder, a.dtype, shapes), tuple(map(int, counts))
