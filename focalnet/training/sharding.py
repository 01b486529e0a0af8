"""FSDP2: parameters, gradients and the optimizer's state in shards, one for each process (torch's ``fully_shard``).

accelerate's configuration asks for it, and its plugin wraps the blocks. Everything that is written is gathered first,
so that files are those of one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from . import processes

VERSION = 2


def is_wanted() -> bool:
    """Whether the configuration that ``accelerate launch`` read asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def set_up(accelerator: Accelerator) -> bool:
    """Prepare accelerate's plugin for FocalNet. Returns whether blocks have to be recomputed in backward.

    Raises:
        ValueError: the configuration asks for FSDP in another version, in one process, or on a CPU that is not torch's
            only device.
    """
    if not is_wanted():
        return False
    if accelerator.num_processes == 1:
        raise ValueError("FSDP: expected several processes, got one; start them with accelerate launch")
    if accelerator.device.type == "cpu" and torch.accelerator.current_accelerator() is not None:
        raise ValueError("FSDP: torch shards on a CPU only in its build for CPUs; leave --device cpu or FSDP out")
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        # accelerate takes no notice of the plugin on a CPU, although torch shards there as well.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != VERSION:
        raise ValueError(
            f"FSDP: expected fsdp_version {VERSION} in accelerate's configuration, got {plugin.fsdp_version}; "
            "recipes/accelerate/fsdp2.yaml is an example"
        )
    plugin.set_state_dict_type("FULL_STATE_DICT")
    plugin.cpu_ram_efficient_loading = False  # every process makes the whole model, then keeps its shard
    # accelerate would also reduce gradients and compute the loss in bfloat16. Trainers use autocast instead, as in one
    # process.
    plugin.mixed_precision_policy = None
    recompute = bool(plugin.activation_checkpointing)
    # accelerate's wrapper draws other random numbers when it recomputes, so that stochastic depth would give gradients
    # of another network than the one in forward. The model's own recomputation repeats them.
    plugin.activation_checkpointing = False
    # The stem returns a view, and nothing is written into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return recompute


def reshard(model: nn.Module) -> None:
    """Make the parameters of a sharded model shards again. After an evaluation some are whole."""
    if not is_wanted():
        return
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def part_here(tensor: Tensor) -> Tensor:
    """The shard of this process; ``tensor`` itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The gathered tensor, in main memory on the first process; the others keep their shard. All must call it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if processes.rank() == 0 else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The whole ``tensor`` in shards as ``parameter`` is. All processes must call it."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors by name into a sharded model. All processes must call it."""
    reshard(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(like(tensors[name], parameter))
