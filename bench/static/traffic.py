"""Counts on a CPU what a Triton program reads and writes.

With TRITON_INTERPRET=1 every kernel runs in Triton's interpreter, one program after the other. `Counter` intercepts
loads and stores and records three things for each launch:

- bytes: the distinct bytes that each program loads from and stores to each storage, summed over programs. A second
  access in a program is assumed to hit a cache. Nothing is shared between programs.
- sectors: the same in 32-byte sectors, the unit in which a GPU moves memory. Views with an odd row pitch need more.
- hazards: addresses that a program accesses twice without a barrier between, or that two programs of a launch access,
  if at least one access is a store. Only barriers order the threads of a program, so one thread may read or overwrite
  data of another too early. Nothing orders programs.

Large grids are sampled. Of a launch with more than ``programs`` programs the first, the last and evenly spaced ones
run, and the sums are scaled. Only addresses matter then. For a grid that is regular in its program index the error is
at most the programs at its edge.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

SECTOR = 32
LOAD, STORE = 1, 2
_VERB = {LOAD: "load", STORE: "store"}


@dataclass
class Hazard:
    """Two accesses to one address, at least one a store, that nothing orders."""

    kernel: str
    storage: str
    kind: str
    program: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.kernel}, program {self.program}: {self.kind} in {self.storage}"


@dataclass
class Launch:
    """The traffic of one launch. ``loaded`` and ``stored``: bytes by the name of the storage."""

    kernel: str
    grid: tuple[int, int, int]
    sampled: int = 0
    loaded: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stored: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    loaded_sectors: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stored_sectors: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    hazards: list[Hazard] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def scale(self) -> None:
        for counts in (self.loaded, self.stored, self.loaded_sectors, self.stored_sectors):
            for name in counts:
                counts[name] *= self.programs / max(self.sampled, 1)


class Storage:
    """One allocation and what a launch has touched of it, an element at a time.

    ``epoch`` holds the last stretch between two barriers in which an element was touched; a stretch belongs to one
    program, the one that began at or before it. ``last`` which tensor of addresses it was in.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.name = name
        self.itemsize = tensor.element_size()
        self.base, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.length = (self.end - self.base) // self.itemsize
        self.begin_launch()

    def begin_launch(self) -> None:
        # Fresh zeros cost nothing until they are touched, however large the storage.
        self.epoch = {kind: np.zeros(self.length, np.int32) for kind in (LOAD, STORE)}
        self.last = {kind: np.zeros(self.length, np.int64) for kind in (LOAD, STORE)}
        self.begin_program()

    def begin_program(self) -> None:
        self.touched = {kind: np.zeros(self.length, bool) for kind in (LOAD, STORE)}
        self.low, self.high = self.length, 0

    def access(
        self, kind: int, addresses: np.ndarray, itemsize: int, epoch: int, program_epoch: int, layout: int
    ) -> str | None:
        """Marks the addresses; returns the kind of hazard, if the access is one."""
        if itemsize != self.itemsize:
            raise ValueError(f"{self.name} holds elements of {self.itemsize} bytes, accessed as {itemsize}")
        index = (addresses - np.uint64(self.base)).astype(np.int64) // itemsize
        self.low, self.high = min(self.low, int(index.min())), max(self.high, int(index.max()) + 1)
        hazard = None
        for earlier in (STORE, LOAD) if kind == STORE else (STORE,):
            last = self.epoch[earlier][index]
            pair = f"{_VERB[kind]} after {_VERB[earlier]}"
            if ((last == epoch) & (self.last[earlier][index] != layout)).any():
                hazard = f"{pair} with no barrier between"
            elif ((last > 0) & (last < program_epoch)).any():
                hazard = f"{pair} by another program"
        self.touched[kind][index] = True
        self.epoch[kind][index] = epoch
        self.last[kind][index] = layout
        return hazard

    def bytes_and_sectors(self, kind: int) -> tuple[int, int]:
        seen = self.touched[kind][self.low : self.high]
        count = int(np.count_nonzero(seen))
        if not count:
            return 0, 0
        per_sector = SECTOR // self.itemsize
        first = self.low + self.base % SECTOR // self.itemsize
        sectors = np.zeros(-(-(first % per_sector + len(seen)) // per_sector) * per_sector, bool)
        sectors[first % per_sector :][: len(seen)] = seen
        return count * self.itemsize, int(sectors.reshape(-1, per_sector).any(1).sum()) * SECTOR


class Counter:
    """Counts what launches inside ``with counter.watching():`` load and store.

    ``names`` gives storages their names; what it does not know is called after the kernel's argument. ``programs``
    limits how many programs of a grid run (None: all, as results need).
    """

    def __init__(self, names: dict[str, torch.Tensor] | None = None, programs: int | None = None) -> None:
        self.programs = programs
        self.launches: list[Launch] = []
        self._storages: dict[int, Storage] = {}
        self._epoch = self._program_epoch = 1
        for name, tensor in (names or {}).items():
            self._register(name, tensor)

    def loaded(self, name: str) -> float:
        return sum(launch.loaded.get(name, 0) for launch in self.launches)

    def stored(self, name: str) -> float:
        return sum(launch.stored.get(name, 0) for launch in self.launches)

    def hazards(self) -> list[Hazard]:
        return [hazard for launch in self.launches for hazard in launch.hazards]

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        base = tensor.untyped_storage().data_ptr()
        if tensor.numel() and base not in self._storages:
            self._storages[base] = Storage(name, tensor)

    def _begin_program(self) -> None:
        self._end_program()
        self._epoch += 1
        self._program_epoch = self._epoch
        self.launches[-1].sampled += 1

    def _end_program(self) -> None:
        launch = self.launches[-1]
        for storage in self._touched():
            for kind, count, sectors in (
                (LOAD, launch.loaded, launch.loaded_sectors),
                (STORE, launch.stored, launch.stored_sectors),
            ):
                bytes_, in_sectors = storage.bytes_and_sectors(kind)
                if bytes_:
                    count[storage.name] += bytes_
                    sectors[storage.name] += in_sectors
            storage.begin_program()

    def _touched(self) -> list[Storage]:
        return [storage for storage in self._storages.values() if storage.high]

    def _access(self, kind: int, pointers: object, mask: object, program: tuple[int, int, int]) -> None:
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[wanted]
        if not addresses.size:
            return
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        storage = self._holding(int(addresses.min()), int(addresses.max()) + itemsize)
        # One tensor of addresses has one layout: what meets itself element by element stays in its threads.
        layout = hash((pointers.data.shape, addresses.tobytes()))
        hazard = storage.access(kind, addresses, itemsize, self._epoch, self._program_epoch, layout)
        launch = self.launches[-1]
        if hazard is not None and len(launch.hazards) < 10:
            launch.hazards.append(Hazard(launch.kernel, storage.name, hazard, program))

    def _holding(self, first: int, end: int) -> Storage:
        for storage in self._storages.values():
            if storage.base <= first and end <= storage.end:
                return storage
        raise IndexError(
            f"{self.launches[-1].kernel} touches addresses {first:#x} to {end:#x}, which no argument holds"
        )

    def _sample(self, grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        total = math.prod(grid)
        count = total if self.programs is None else min(self.programs, total)
        flat = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
        return [tuple(int(i) for i in np.unravel_index(index, grid)) for index in flat]

    @contextlib.contextmanager
    def watching(self) -> Iterator[Counter]:
        from triton.runtime import interpreter

        with contextlib.ExitStack() as patches, np.errstate(all="ignore"):
            for target, name, wrapper in (
                (interpreter, "_patch_lang", self._patch_once),
                (interpreter.GridExecutor, "__call__", self._around_launch),
                (interpreter.InterpreterBuilder, "set_grid_dim", self._around_grid),
                (interpreter.InterpreterBuilder, "set_grid_idx", self._around_index),
                (interpreter.InterpreterBuilder, "create_masked_load", self._around(LOAD)),
                (interpreter.InterpreterBuilder, "create_masked_store", self._around(STORE)),
                (interpreter.InterpreterBuilder, "create_barrier", self._around_barrier),
                (interpreter.InterpreterBuilder, "create_atomic_rmw", self._refuse_atomics),
                (interpreter.InterpreterBuilder, "create_atomic_cas", self._refuse_atomics),
            ):
                original = getattr(target, name)
                setattr(target, name, wrapper(original))
                patches.callback(setattr, target, name, original)
            yield self

    def _patch_once(self, original):
        """The interpreter patches triton.language anew for every call of a device function: half of its time."""
        from triton.runtime import interpreter

        def patch(function):
            languages = {id(interpreter.tl), id(interpreter.tl.core)}
            seen = frozenset(id(value) for value in function.__globals__.values()) & languages
            if seen in self._patched:
                return interpreter._LangPatchScope()
            self._patched.add(seen)
            return original(function)

        return patch

    def _around_launch(self, original):
        def launch(executor, *args, **kwargs):
            self._patched = set()
            grid = tuple(executor.grid)
            self._grid = (*grid, *[1] * (3 - len(grid)))
            self._chosen = self._sample(self._grid)
            self.launches.append(Launch(executor.fn.__name__, self._grid))
            for storage in self._storages.values():
                storage.begin_launch()
            named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
            for name, argument in _tensors_of(named):
                self._register(name, argument)
            executor.grid = (len(self._chosen), 1, 1)
            original(executor, *args, **kwargs)
            self._end_program()
            self.launches[-1].scale()

        return launch

    def _around_grid(self, original):
        return lambda builder, *_: original(builder, *self._grid)

    def _around_index(self, original):
        def set_grid_idx(builder, index, *_):
            self._begin_program()
            original(builder, *self._chosen[index])

        return set_grid_idx

    def _around(self, kind: int):
        def wrap(original):
            def access(builder, pointers, *args):
                # load: (pointers, mask, other, ...), store: (pointers, value, mask, ...)
                self._access(kind, pointers, args[0] if kind == LOAD else args[1], builder.grid_idx)
                return original(builder, pointers, *args)

            return access

        return wrap

    def _around_barrier(self, original):
        def barrier(builder):
            self._epoch += 1
            return original(builder)

        return barrier

    def _refuse_atomics(self, original):
        def atomic(*args, **kwargs):
            raise NotImplementedError("atomics are not counted: their order is not defined")

        return atomic


def _tensors_of(arguments: dict[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, argument in arguments.items():
        several = isinstance(argument, Sequence) and not isinstance(argument, str)
        for index, value in enumerate(argument if several else [argument]):
            if isinstance(value, torch.Tensor):
                yield (f"{name}[{index}]" if several else name), value
