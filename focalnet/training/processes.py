"""The processes that torchrun or ``accelerate launch`` started for one command, and what they tell each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def count() -> int:
    """The number of processes; 1 if no launcher started this one."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


def rank() -> int:
    """The number of this process, from 0. The first one prints and writes for all."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def device_here(device: torch.device) -> torch.device:
    """``device``, or on a machine with several GPUs the one of this process."""
    import torch

    if device.type != "cuda" or count() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def meet(on_cpu: bool) -> None:
    """Connect the processes, if there are several. Objects travel over gloo, tensors of GPUs over NCCL."""
    if count() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)


def leave() -> None:
    """Disconnect. Otherwise threads of gloo that still run can crash the interpreter when it ends."""
    if count() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def gathered(value: T) -> list[T]:
    """The ``value`` of each process, in the order of their ranks. All processes must call it after `meet`."""
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[T | None] = [None] * count()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled


def any_of_all(flag: bool) -> bool:
    """Whether ``flag`` is true in any process. All processes must call it after `meet`."""
    if count() == 1:
        return flag
    import torch
    from torch import distributed

    flags = torch.tensor([flag], dtype=torch.uint8)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)
