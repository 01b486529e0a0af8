"""Checks the preconditions of a run, and finds the checkpoint to resume from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from . import processes
from .events import Events
from .saving import checkpoints, why_no_space, write_json
from .sources import Source
from .trainer import CHECKPOINTS_KEPT

if TYPE_CHECKING:
    from ..configuration import FocalNetConfig
    from .runs import Run

RUN_FILE = "run.json"
# Settings that a resumed run may change without changing the result.
_FREE_ON_RESUMING = ("max_minutes", "workers", "save_steps")


def refuse_taken_output(run: Run) -> None:
    """Raise ValueError if the output folder is not empty and the run does not resume it."""
    is_taken = run.output.exists() and (not run.output.is_dir() or any(run.output.iterdir()))
    # Asked together, since the first process writes there soon.
    if processes.any_of_all(is_taken and not run.resume):
        raise ValueError(
            f"output {run.output}: there is something already; --resume goes on, else choose another folder"
        )


def check_batch(run: Run, arguments: TrainingArguments, images: int) -> None:
    """Raise ValueError if there are too few images for a step, or the device does not support bfloat16."""
    s = run.settings
    together = s.batch_size * arguments.world_size
    if together > images:
        raise ValueError(
            f"batch_size: expected at most the {images} images to train on, got {s.batch_size} on each of "
            f"{arguments.world_size} process(es); use --batch-size {max(1, images // arguments.world_size)} or less"
        )
    if s.bf16 and arguments.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"bf16: {torch.cuda.get_device_name()} has no bfloat16; leave --bf16 out")


def check_masks(run: Run, config: FocalNetConfig, stride: int) -> None:
    """Raise ValueError if masked squares or the image do not fit the model's grid. The stem has ``stride``."""
    s = run.settings
    if s.mask_patch_size % stride:
        raise ValueError(
            f"mask_patch_size: expected a multiple of the stem's stride {stride}, got {s.mask_patch_size}"
        )
    network = stride * 2 ** (len(config.depths) - 1)
    if config.drop_incomplete_patches and s.image_size % network:
        raise ValueError(
            f"image_size: expected a multiple of the network's stride {network} because drop_incomplete_patches is "
            f"set, got {s.image_size}"
        )


def check_space(run: Run, parameters: int) -> None:
    """Raise ValueError if checkpoints with this number of parameters do not fit on the disk."""
    if reason := why_no_space(run.output, bytes_on_disk(parameters, run.settings.ema > 0)):
        raise ValueError(f"output {run.output}: {reason}; free some space, or choose another disk")


def bytes_on_disk(parameters: int, averaged: bool) -> int:
    """The bytes on disk that a run needs at most.

    A checkpoint holds the float32 weights, AdamW's two moments and the average. `CHECKPOINTS_KEPT` of them are kept,
    and the next one is complete before the oldest is removed. The final weights count twice, because they are written
    to a temporary folder first.
    """
    one = 4 * parameters * (4 if averaged else 3)
    return one * (CHECKPOINTS_KEPT + 1) + 2 * 4 * parameters + 2**20


def checkpoint_to_resume(
    run: Run, arguments: TrainingArguments, task: str, source: Source, events: Events
) -> Path | None:
    """The checkpoint to resume from, or None. Records the run's data and settings, to be checked when it is resumed.

    Raises:
        ValueError: the output folder holds a run with other data or settings.
    """
    record = {
        "task": task,
        "data": run.data,
        "images": len(source.train),
        "labels": source.labels,
        "model": run.start.model,
        "config": run.start.config or {},
        "processes": arguments.world_size,
        "settings": {k: v for k, v in asdict(run.settings).items() if k not in _FREE_ON_RESUMING},
    }
    record = json.loads(json.dumps(record))
    path = run.output / RUN_FILE
    found = checkpoints(run.output / "checkpoints")
    _refuse_separate_disks(run, found)
    if run.resume and path.exists():
        _refuse_differences(record, json.loads(path.read_text(encoding="utf-8")), run.output)
    if arguments.process_index == 0:
        write_json(path, record)
        if run.resume and not found:
            events.note(f"nothing to resume in {run.output}: no whole checkpoint there; starting from the beginning")
    return found[-1] if run.resume and found else None


def _refuse_separate_disks(run: Run, found: list[Path]) -> None:
    """Raise ValueError if a run on several machines is resumed and not all of them see its checkpoints."""
    names = [path.name for path in found] if run.resume else []
    seen = processes.gathered(names)
    if any(others != seen[0] for others in seen):
        raise ValueError(
            f"--resume {run.output}: expected a folder that all machines see; process {processes.rank()} finds "
            f"{', '.join(names) or 'no checkpoint'} there, the first one {', '.join(seen[0]) or 'none'}"
        )


def _refuse_differences(now: dict[str, Any], before: dict[str, Any], output: Path) -> None:
    def flat(record: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in record.items() if k != "settings"}, **record.get("settings", {})}

    now, before = flat(now), flat(before)
    differ = [name for name in now if now[name] != before.get(name)]
    if differ:
        some = "; ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in differ[:4])
        raise ValueError(f"--resume {output}: expected the run that is there, but {some}")
