"""What the performance models predict: every stage of the published variants, on four GPUs, by use.

Variants share stages: the small ones have those of the tiny ones. A stage is predicted once, under the first variant
that has it: `named` says which. Of `DETAILED` each kernel has a row, of the others a call has one.
"""

from __future__ import annotations

import functools
import itertools
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from focalnet.benchmark.floors import OPERATORS, Stage, stages
from focalnet.benchmark.rows import NOWHERE, read, write_table
from focalnet.variants import VARIANTS

NOTHING = "Nothing is predicted yet."
# By use: what comes first is predicted first.
DEVICES, DTYPES, BATCHES = ("H100", "B200", "A100", "RTX 4090"), ("bfloat16", "float16", "float32"), (128, 8, 1)
DETAILED = ("tiny_lrf", "large_fl3")
# Predicted for every case before the others: its stages are of every class of the automatic order (gpu_order.py).
FIRST = "tiny_lrf"
# What a bar asks for beside: (variant, stage, device, dtype, batch).
BESIDE = (("large_fl3", 1, "H100", "bfloat16", 32),)
Case = tuple[str, str, int]  # device, dtype, batch
EVERY: tuple[Case, ...] = tuple(itertools.product(DEVICES, DTYPES, BATCHES))
OF_FILE = {"predicted": OPERATORS, "predicted_cuda": OPERATORS[:2]}


@dataclass(frozen=True)
class Group:
    """Calls that are predicted together: their kernels are the same ones."""

    device: str
    dtype: str
    batch: int
    backward: bool

    def operators(self, among: Sequence[str]) -> list[str]:
        return [operator for operator in among if operator.endswith("_bwd") == self.backward]

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}, batch {self.batch}, {'backward' if self.backward else 'forward'}"


def groups() -> list[Group]:
    """Of everything, by use: an H100 in every dtype, then the other devices."""
    by_use = sorted(EVERY, key=lambda one: (one[0] != DEVICES[0], DTYPES.index(one[1]), DEVICES.index(one[0])))
    cases = [*by_use, *((device, dtype, batch) for _, _, device, dtype, batch in BESIDE)]
    return [Group(*case, backward) for case in cases for backward in (False, True)]


@functools.cache
def sizes() -> tuple[Stage, ...]:
    """Every stage of the published variants, each size once."""
    return tuple(stage for stage in _all_stages() if named(stage.variant, stage.index + 1) == stage)


def named(variant: str, number: int) -> Stage:
    """The stage under whose name a variant's stage (from 1) is predicted."""
    return _names()[_size(stages(variant)[number - 1])]


def stages_of(group: Group) -> list[Stage]:
    if group.batch in BATCHES:
        return list(sizes())
    asked = {(variant, number) for variant, number, *case in BESIDE if case == [*_case(group)]}
    return [stage for stage in sizes() if (stage.variant, stage.index + 1) in asked]


def _case(group: Group) -> tuple[str, str, int]:
    return group.device, group.dtype, group.batch


@functools.cache
def _names() -> dict[tuple, Stage]:
    found: dict[tuple, Stage] = {}
    for stage in _all_stages():
        found.setdefault(_size(stage), stage)
    return found


def _all_stages() -> Iterator[Stage]:
    for variant in dict.fromkeys((*DETAILED, *VARIANTS)):
        yield from stages(variant)


def _size(stage: Stage) -> tuple:
    return stage.height, stage.width, stage.channels, stage.kernels


# ---- calls, as rows name them ---------------------------------------------------------------------------------------

Call = tuple[str, int, str, str, int, str]  # variant, stage, device, dtype, batch, operator


def call_of(row: dict) -> Call:
    return tuple(row[name] for name in ("variant", "stage", "x", "dtype", "batch", "operator"))


def calls(operators: Sequence[str]) -> list[Call]:
    """All that are predicted, by use."""
    return [call for call, _, _ in _calls(operators)]


def _calls(operators: Sequence[str]) -> Iterator[tuple[Call, Group, Stage]]:
    for group in groups():
        for stage, operator in itertools.product(stages_of(group), group.operators(operators)):
            yield (stage.variant, stage.index + 1, *_case(group), operator), group, stage


def lacking(rows: Iterable[dict], operators: Sequence[str]) -> dict[Case, tuple[int, int]]:
    """By device, dtype and batch: how many calls have no row, and of how many. Those that have all are not here."""
    have = {call_of(row) for row in rows if row["subject"] == "all"}
    every = calls(operators)
    of = Counter(call[2:5] for call in every)
    return {case: (count, of[case]) for case, count in Counter(one[2:5] for one in every if one not in have).items()}


def in_words(left_out: Mapping[Case, tuple[int, int]]) -> str:
    """Such as "H100: bfloat16 at batch 8 (3 of 84 calls), 1; float32 at batch 1. B200: ..."."""
    found: dict[str, dict[str, list[str]]] = {}
    for (device, dtype, batch), (count, of) in left_out.items():
        some = f"{batch}" if count == of else f"{batch} ({count} of {of} calls)"
        found.setdefault(device, {}).setdefault(dtype, []).append(some)

    def of_device(types: dict[str, list[str]]) -> str:
        return "; ".join(f"{dtype} at batch {', '.join(batches)}" for dtype, batches in types.items())

    return ". ".join(f"{device}: {of_device(types)}" for device, types in found.items())


def page() -> str:
    """What the committed rows are of, and what is left out, for docs/performance.md."""
    stored = {file: read(file, NOWHERE) for file in OF_FILE}
    if not any(stored.values()):
        return NOTHING
    lines = []
    for file, operators in OF_FILE.items():
        left_out = lacking(stored[file], operators)
        what = f"left out are {in_words(left_out)}" if left_out else "nothing is left out"
        missing, every = sum(count for count, _ in left_out.values()), len(calls(operators))
        lines.append(f"- `{file}.csv` has {every - missing} of {every} calls; {what}.")
    return "\n".join(lines)


def kept(rows: Sequence[dict]) -> list[dict]:
    """Of the rows of a call, whose own comes first: all if its variant is a detailed one, else that one."""
    return [*rows] if rows[0]["variant"] in DETAILED else [rows[0]]


def in_order(rows: Iterable[dict], operators: Sequence[str]) -> list[dict]:
    """Rows of the calls that are predicted, call by call; those of no such call are left out."""
    place = {call: number for number, call in enumerate(calls(operators))}
    return sorted((row for row in rows if call_of(row) in place), key=lambda row: place[call_of(row)])


# ---- predicting -----------------------------------------------------------------------------------------------------

Work = tuple[Group, tuple[Stage, ...]]


@dataclass(frozen=True)
class Table:
    """The rows of a model: their file, its columns, and whether the row of a call is of the sources that are here."""

    file: str
    fields: tuple[str, ...]
    operators: tuple[str, ...]
    is_current: Callable[[dict], bool]

    def current(self) -> list[dict]:
        """The stored rows of calls whose sources are here, and which are predicted at all."""
        stored = read(self.file, NOWHERE)
        calls = {call_of(row) for row in stored if row["subject"] == "all" and self.is_current(row)}
        return in_order((row for row in stored if call_of(row) in calls), self.operators)

    def lacking(self, rows: Iterable[dict]) -> list[Work]:
        """Of the calls that ``rows`` do not have: groups, and stages whose kernels are the same ones."""
        have = {call_of(row) for row in rows if row["subject"] == "all"}
        work: dict[tuple, dict[Stage, None]] = {}
        for call, group, stage in _calls(self.operators):
            if call not in have:
                work.setdefault((stage.variant != FIRST, group, stage.kernels), {})[stage] = None
        first = sorted(work, key=lambda part: part[0])
        return [(part[1], tuple(work[part])) for part in first]

    def fill(self, rows_of: Callable[[Group, tuple[Stage, ...]], list[dict]], jobs: int) -> None:
        """Predict what is missing and write it as it comes; print what is missing at the end."""
        rows = self.current()

        def save(fresh: list[dict]) -> None:
            rows.extend(fresh)
            write_table(in_order(rows, self.operators), self.file, NOWHERE, self.fields)

        save([])
        failed = _in_processes(self.lacking(rows), rows_of, save, jobs)
        left_out = lacking(rows, self.operators)
        print(f"left out: {in_words(left_out)}" if left_out else "every call has its rows")
        if failed:
            raise SystemExit(f"{failed} groups failed, for the reasons above")


def _in_processes(todo: Sequence[Work], rows_of: Callable, save: Callable[[list[dict]], None], jobs: int) -> int:
    """Call ``rows_of`` for each group, and ``save`` with what comes back; how many groups failed.

    A group that fails says why at once and leaves the others alone. Ctrl-C ends it all; what is saved stays.
    """
    failed = 0
    with ProcessPoolExecutor(max(1, min(jobs, len(todo))), initializer=_end_with_an_interrupt) as pool:
        waiting = {pool.submit(rows_of, *work): work for work in todo}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                group, its_stages = waiting[done]
                place = f"{number} of {len(todo)}: {group}, {its_stages[0].kernels}"
                error = done.exception()
                if error is None:
                    save(done.result())
                    print(f"{place}: {len(its_stages)} stages", flush=True)
                elif isinstance(error, BrokenProcessPool):
                    raise error
                else:
                    failed += 1
                    print(f"{place} failed: {error}", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, BrokenProcessPool):
            pool.shutdown(wait=False, cancel_futures=True)
            print("stopped: what was predicted is kept; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    return failed


def _end_with_an_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
