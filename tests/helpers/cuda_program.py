"""The kernels of csrc/cuda as a program for the CPU (cuda_on_cpu/), and one call of it: operands in, results out."""

import concurrent.futures
import functools
import os
import re
import shlex
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from compile_cache import longest_first, made_once

TESTS = Path(__file__).parents[1]
CUDA = TESTS.parent / "csrc" / "cuda"
SOURCES = [
    *sorted(CUDA.glob("*.cu")),
    *sorted(CUDA.glob("*plan.cpp")),
    TESTS / "cuda" / "cuda_on_cpu" / "main.cpp",
]
# -fno-strict-aliasing: the kernels read a pair of elements as one word, which CUDA allows and standard C++ does not.
FLAGS = ["-Og", "-g1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
CHECKS = "address,alignment,integer-divide-by-zero,signed-integer-overflow"
SANITIZERS = [f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all"]

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


def compiler():
    return shlex.split(os.environ.get("CXX", "g++"))


def compiled(source):
    """The object of a source, compiled once for all processes and checkouts, until it, a header or a flag changes."""
    folders, flags = [TESTS / "cuda" / "cuda_on_cpu", CUDA], [*FLAGS, *SANITIZERS]
    # An object names its sources from the root, so it is the same in every checkout.
    here = [f"-ffile-prefix-map={TESTS.parent}=.", *(f"-I{folder}" for folder in folders)]
    headers = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.*h"))]

    def make(folder):
        run([*compiler(), *flags, *here, "-x", "c++", "-c", source, "-o", folder / "object.o"])

    of = [_version(), *compiler(), *flags, source.name, source.read_bytes(), *headers]
    return made_once(of, make) / "object.o"


def linked(sources=SOURCES):
    """The program of ``sources``."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, longest_first(sources)))

    def make(folder):
        run([*compiler(), *SANITIZERS, *objects, "-o", folder / "program"])

    return made_once([*SANITIZERS, *map(str, objects)], make) / "program"


@functools.cache
def _version():
    return run([*compiler(), "--version"])


def run(command, without=None):
    """What a command prints. ``without``: the barrier that the program leaves out, as cuda_runtime.h takes it."""
    environment = os.environ if without is None else os.environ | {"CUDA_ON_CPU_WITHOUT": without}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr[-8000:]}"
    return result.stdout


def barrier_at(source, text):
    """``file:line`` of the one barrier in ``text``, which must occur once in that source of csrc/cuda."""
    before, _, after = (CUDA / source).read_text().partition(text)
    assert after and text not in after, f"{source} has {text!r} not once"
    (call,) = re.finditer(r"__sync\w+\(\);", text)
    return f"{source}:{(before + text[: call.start()]).count(chr(10)) + 1}"


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
    forward, backward, *cuts = run([program, folder / "case"]).splitlines()
    fields = (line.split() for line in cuts)
    return forward, backward, [Cut(what, *map(int, rest[:-1]), rest[-1] == "1") for what, *rest in fields]


def grids(program, folder, shape, dtype, device, tensor_cores=False):
    """Blocks of every launch of backward, with agg once more, for a contiguous problem of this shape."""
    (folder / "case").write_bytes(_without_tensors(1, shape, dtype, device, tensor_cores))
    _, *launches = run([program, folder / "case", "-", "launches"]).splitlines()
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
    without=None,
    planar=False,
):
    """(path taken, outputs): agg, or with ``dagg`` what ``mask`` wants of [dctx, dgates, agg, *dfocal_weights].

    With ``gradient_pitch`` dctx and dgates are written into a packed gradient (B, H, W, pitch), behind C elements of a
    row for dq. It takes their places in the list, and what is not written is NaN. ``without``: see ``run``.
    ``planar``: dagg is given, and agg written, as a matrix (C, B * H * W).
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
    path, conflicts = run([program, folder / "case", folder / "result"], without).splitlines()
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


def modulate(program, folder, a, b, out=None, want_sum=False, multiprocessors=132, seed=0, without=None):
    """(the storage of a * b, its sum over the rows or nothing, (launches, blocks of the last one)), for rows (n, C).

    ``out`` says how the product lies in a storage of its own; without it the product replaces ``a``.
    """
    place = a if out is None else out
    numbers = [2, seed, ELEMENTS[a.dtype], *a.shape, multiprocessors, int(want_sum), int(out is None)]
    for rows in (a, b, place):
        numbers += [storage_of(rows).numel(), rows.storage_offset(), rows.stride(0)]
    (folder / "case").write_bytes(case(numbers) + raw(storage_of(a)) + raw(storage_of(b)))
    counts = run([program, folder / "case", folder / "result"], without).split()
    shapes = [(storage_of(place).numel(),), (a.shape[1] * want_sum,)]
    return *results(folder, a.dtype, shapes), tuple(map(int, counts))
