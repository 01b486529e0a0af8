"""The work of each of two processes in test_training_tools.py. They import it by name, so it is a separate module."""

import os

import torch
from small_models import images
from small_sources import MAKE, fast
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def gradients(model, batch):
    model(batch).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(rank, folder):
    """Save every source's gradients with DDP and FSDP2, for one image per process, and its logits with FSDP2."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for source in MAKE:
        mine = images()[rank : rank + 1]
        wrapped = DistributedDataParallel(fast(source))
        results[source, "DDP"] = {k.removeprefix("module."): g for k, g in gradients(wrapped, mine).items()}
        sharded = fast(source)
        for module in [m for m in sharded.modules() if hasattr(m, "modulation")]:
            torch.distributed.fsdp.fully_shard(module)
        torch.distributed.fsdp.fully_shard(sharded)
        assert any(isinstance(p, DTensor) for p in sharded.parameters())
        with torch.no_grad():
            results[source, "inference"] = {"logits": sharded(images())}
        results[source, "FSDP2"] = {name: g.full_tensor() for name, g in gradients(sharded, mine).items()}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.barrier()
    # Skips the interpreter's teardown, in which running threads of gloo may end the process with SIGABRT.
    os._exit(0)
