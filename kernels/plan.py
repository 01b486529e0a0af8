"""A plan: what an operator launches for one kind of call, as plain data.

A plan is a pure function of shapes, pitches, dtype and device properties. It is used three ways: run on tensors
(`Plan.run`), compiled without a GPU (`Launch.ast`) and read by the tools that count bytes and registers. `launches`
says in order what runs; a launch names its tensors, and the plan says how large those are that the operator makes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from .launch_table import LevelConfig
from .padding import padded_row

INTERPRETED = triton.knobs.runtime.interpret
_TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# Planes that a program walks over within one chunk, at most: this bounds the scratch of a large batch.
MAX_ITEMS = 16


@dataclass(frozen=True)
class Device:
    """What the configuration depends on. ``arch`` is the compute capability times ten, 90 for an H100."""

    arch: int
    sm_count: int
    l2_bytes: int
    # Shared memory that one program may have; 0: what GPUs of this architecture have.
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.shared_bytes:
            object.__setattr__(self, "shared_bytes", SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values())))

    @classmethod
    def of(cls, device: torch.device) -> Device:
        if device.type != "cuda":
            return H100  # the interpreter
        properties = torch.cuda.get_device_properties(device)
        return cls(
            10 * properties.major + properties.minor,
            properties.multi_processor_count,
            properties.L2_cache_size,
            getattr(properties, "shared_memory_per_block_optin", 0),
        )

    @property
    def on_chip_bytes(self) -> int:
        """Scratch that is alive at once stays below this share of the L2, which the inputs pass through too."""
        return int(0.6 * self.l2_bytes)


A100 = Device(80, 108, 40 * 2**20)
RTX_3090 = Device(86, 82, 6 * 2**20)
RTX_4090 = Device(89, 128, 72 * 2**20)
H100 = Device(90, 132, 50 * 2**20)
B200 = Device(100, 148, 126 * 2**20)
RTX_5090 = Device(120, 170, 96 * 2**20)


@dataclass(frozen=True)
class Case:
    """One kind of call: all that decides what is launched.

    A pitch counts elements from pixel to pixel (channels are contiguous, pixels of all images evenly spaced).
    ``mask`` says which gradients are asked for, in the order of the operator's output_mask. ``gradient_pitch`` is that
    of dq, dctx and dgates if the caller gives them, as parts of one packed gradient; 0 if the plan makes them.
    """

    batch: int
    height: int
    width: int
    channels: int
    kernel_sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    normalize: bool = False
    ctx_pitch: int = 0
    gates_pitch: int = 0
    q_pitch: int = 0
    has_bias: bool = False
    mask: tuple[bool, ...] = ()
    gradient_pitch: int = 0

    @property
    def dctx_pitch(self) -> int:
        """Also that of dq."""
        return self.gradient_pitch or self.channels

    @property
    def dgates_pitch(self) -> int:
        return self.gradient_pitch or self.levels + 1

    @property
    def levels(self) -> int:
        return len(self.kernel_sizes)

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def kernel_heights(self) -> tuple[int, ...]:
        return tuple(kh for kh, _ in self.kernel_sizes)

    @property
    def taps(self) -> int:
        return sum(kh * kw for kh, kw in self.kernel_sizes)

    @property
    def scale(self) -> float:
        return 1 / (self.levels + 1) if self.normalize else 1.0

    @classmethod
    def packed(
        cls, batch: int, height: int, width: int, channels: int, kernels: tuple, dtype: torch.dtype, **rest: object
    ) -> Case:
        """q, ctx and gates as views of one projection of 2 C + L + 1 features, padded as a model pads its rows."""
        pitch = padded_row(2 * channels + len(kernels) + 1)
        kernel_sizes = tuple((k, k) if isinstance(k, int) else tuple(k) for k in kernels)
        pitches = {"ctx_pitch": pitch, "gates_pitch": pitch, "q_pitch": pitch}
        return cls(batch, height, width, channels, kernel_sizes, dtype, **(pitches | rest))


@dataclass(frozen=True)
class Buffer:
    """A tensor that the operator makes: an output, or scratch that is read back while it is in L2."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_output: bool = False
    zeroed: bool = False

    @property
    def nbytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


def with_scratch(buffers: Mapping[str, Buffer], scratch: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """The buffers and those of one more chunk. Chunks share them, so of each name the larger: the last chunk may have
    fewer images than the others and, cut into more bands, more programs."""
    merged = dict(buffers)
    for name, buffer in scratch.items():
        if name not in merged or buffer.nbytes > merged[name].nbytes:
            merged[name] = buffer
    return merged


def largest_chunk(case: Case, device: Device, config: LevelConfig) -> int:
    """Images of a chunk: all, unless the configuration asks for several chunks or their scratch would grow too large.

    A launch has to fill the device, and every chunk costs the launches of a call once more. What the kernels hand to
    one another goes through memory then where the L2 is too small; that costs less than processors without work.
    """
    if config.chunks:
        return math.ceil(case.batch / config.chunks)
    blocks = math.ceil(case.channels / config.block_c)
    programs = config.programs_per_sm * device.sm_count
    return min(case.batch, max(1, MAX_ITEMS * programs // blocks))


def chunks(batch: int, chunk: int) -> list[tuple[int, int]]:
    """(first image, images) of each chunk."""
    return [(first, min(chunk, batch - first)) for first in range(0, batch, max(chunk, 1))]


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``arguments`` in the kernel's order: a tensor by its name, a number as it is.

    Numbers are never specialised on their value: the same compiled kernel serves every image size and batch.
    """

    kernel: Callable
    grid: tuple[int, int, int]
    arguments: Mapping[str, str | int]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int = 1
    # Registers of a thread, at most. Without a bound ptxas may spill some to fit one more program on a processor.
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        # In the kernel's order, as the launcher wants them.
        for mapping in ("arguments", "constexprs"):
            given = getattr(self, mapping)
            object.__setattr__(self, mapping, {name: given[name] for name in self.kernel.arg_names if name in given})
        if [*self.arguments, *self.constexprs] != list(self.kernel.arg_names):
            raise ValueError(f"{self.name}: arguments do not match {self.kernel.arg_names}")

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton compiles with, here and without a GPU. Its launcher takes no None."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}

    def ast(self, dtype_of: Mapping[str, torch.dtype]) -> tuple[dict, dict, dict]:
        """(signature, constexprs, attrs) for `triton.compiler.ASTSource`; pointers are aligned to 16 bytes."""
        signature, attrs = {}, {}
        for position, (parameter, value) in enumerate(self.arguments.items()):
            if isinstance(value, str):
                signature[parameter] = _TRITON_TYPES[dtype_of[value]]
                attrs[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter] = "i32"
        signature |= dict.fromkeys(self.constexprs, "constexpr")
        return signature, dict(self.constexprs), attrs


@dataclass
class Plan:
    """Launches, and the buffers they name that are not arguments of the operator."""

    launches: list[Launch]
    buffers: dict[str, Buffer]
    operands: dict[str, torch.dtype]
    # Scratch that is alive at once, at most; chunks and grids are chosen to keep it on chip.
    alive_bytes: int = 0
    # What a first run leaves behind: launchers, and which of the values (see `_values`) are their arguments.
    _compiled: list[tuple[Callable, Callable]] = field(default_factory=list, repr=False)
    _constants: list = field(default_factory=list, repr=False)
    # Scratch lies in one allocation: name -> first byte, and how many bytes there are.
    _offsets: dict[str, int] = field(default_factory=dict, repr=False)
    _workspace_bytes: int = 0

    def __post_init__(self) -> None:
        for name, buffer in self.buffers.items():
            if not (buffer.is_output or buffer.zeroed):
                self._offsets[name] = self._workspace_bytes
                self._workspace_bytes += -(-buffer.nbytes // 256) * 256

    def dtype_of(self) -> dict[str, torch.dtype]:
        return self.operands | {name: buffer.dtype for name, buffer in self.buffers.items()}

    def run(self, operands: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Launches everything on the current stream; returns the outputs by name."""
        if self._compiled:
            return self.run_at([operands[name].data_ptr() for name in self.operands], device)
        made, workspace = self._allocate(device)
        self._launch_first({**operands, **made, **self._views(workspace)})
        return self._outputs(made)

    @property
    def is_warm(self) -> bool:
        """Whether everything has been compiled and `run_at` can be called."""
        return bool(self._compiled)

    def run_at(self, addresses: list[int], device: torch.device) -> dict[str, Tensor]:
        """`run` on the addresses of ``operands``, in their order: a launcher asks the driver about each tensor."""
        made, workspace = self._allocate(device)
        values = self._values(addresses, made, workspace)
        for launch, arguments_of in self._compiled:
            launch(*arguments_of(values))
        return self._outputs(made)

    def _allocate(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        made = {}
        for name, buffer in self.buffers.items():
            if name not in self._offsets:
                make = torch.zeros if buffer.zeroed else torch.empty
                made[name] = make(buffer.shape, dtype=buffer.dtype, device=device)
        return made, torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device)

    def _values(self, addresses: list[int], made: Mapping[str, Tensor], workspace: Tensor) -> list:
        """All that launches are given: addresses of operands, of what was made, of scratch, and the constants."""
        start = workspace.data_ptr()
        made_at = [tensor.data_ptr() for tensor in made.values()]
        return [*addresses, *made_at, *[start + offset for offset in self._offsets.values()], *self._constants]

    def _outputs(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in made.items() if self.buffers[name].is_output}

    def _views(self, workspace: Tensor) -> dict[str, Tensor]:
        views = {}
        for name, offset in self._offsets.items():
            buffer = self.buffers[name]
            views[name] = workspace[offset : offset + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
        return views

    def _launch_first(self, tensors: Mapping[str, Tensor]) -> None:
        """By Triton's own launcher, which compiles; what it gives back is kept and called directly from then on."""
        launchers = []
        for launch in self.launches:
            arguments = {name: tensors[a] if isinstance(a, str) else a for name, a in launch.arguments.items()}
            kernel = launch.kernel[launch.grid](**arguments, **launch.constexprs, **launch.options)
            if not INTERPRETED:
                launchers.append(kernel[launch.grid])
        self._keep(launchers)

    def _keep(self, launchers: list[Callable]) -> None:
        """``launchers`` take the arguments of their launch in the kernel's order, tensors by address."""
        names = [*self.operands, *(n for n in self.buffers if n not in self._offsets), *self._offsets]
        self._constants, compiled = [None], []
        for launcher, launch in zip(launchers, self.launches, strict=bool(launchers)):
            places = []
            for value in launch.arguments.values():
                if isinstance(value, str):
                    places.append(names.index(value))
                else:
                    places.append(len(names) + len(self._constants))
                    self._constants.append(value)
            # The launcher looks at no constexpr, but counts them.
            places += [len(names)] * len(launch.constexprs)
            compiled.append((launcher, operator.itemgetter(*places)))
        self._compiled = compiled
