"""Many processes, one run: who takes which rows, what they agree on, and how the model is spread over them.

Every process builds the same run, takes rows r, r + W, r + 2 W, .. of each micro-batch and adds its part of the
gradient. What a step needs to know of the others' rows (how many targets there are in all) is a function of the plan,
so nobody has to be asked. Decisions that would part the processes' ways (a signal, an unreadable shard) are made
together.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..model import HRMForCausalLM
from ..ranks import ALONE, Ranks


def join(timeout_minutes: float) -> Ranks:
    """The processes that torchrun started, or just this one. One that waits longer than the timeout for the others
    gives up with an error, so that a dead or stalled one cannot hold the run for ever."""
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return ALONE
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **_store(timeout_minutes))
    return Ranks(dist.get_rank(), dist.get_world_size())


def _store(timeout_minutes: float) -> dict:
    """Where the processes of one machine meet after torchrun restarted them: its store still has the addresses of those
    that died, so each attempt has names of its own. Between machines attempts are counted differently."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]:
        return {}
    rank, size, wait = int(env["RANK"]), int(env["WORLD_SIZE"]), timedelta(minutes=timeout_minutes)
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, False, timeout=wait)
    attempt = f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": size}


def leave() -> None:
    """End the process group, where there is one. Nothing should refer to a DistributedDataParallel any more: the last
    to hold the group ends its threads, and DistributedDataParallel would wait for them with Python's lock, for which a
    thread may be waiting."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """`device`, or of several GPUs in this machine the one that is this process's own."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def spread(model: HRMForCausalLM, parallel: str, ranks: Ranks) -> nn.Module:
    """The module to call in training: the model itself, DistributedDataParallel around it, or the model in shards.

    fsdp: FSDP2's fully_shard of each outer block, of the core as one, and of the rest. Between steps a process holds
    its share of parameters, gradients and optimizer state. Within a step parameters are gathered once and kept: the
    core applies its blocks dozens of times, and rows halt at different steps on different ranks, so that gathering
    them at each use would cost as many exchanges and need an agreement on each. The halting head stays whole.
    """
    if ranks.size == 1:
        return model
    if parallel != "fsdp":
        ids = [model.device.index] if model.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(model.device.type, (ranks.size,))
    whole = set(model.hrm_core.q_head.parameters())
    for module in (*model.input_blocks, model.hrm_core, *model.output_blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    with torch.no_grad():  # FSDP takes the module that is called first for the root, and explorers call blocks
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), force_steps=1)
    for part in shards(model):
        part.reshard()
        # By default FSDP gathers in a backward pass what it saw come next, and processes see different things: only the
        # first draws samples, and not all have explorers. Here all is gathered by then; a part that names itself waits
        # for nobody.
        part.set_modules_to_backward_prefetch([part])
    return model


def shards(model: nn.Module) -> list:
    """The modules whose parameters are in shards (FSDPModules); none without fsdp."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


def gather_parameters(model: nn.Module) -> None:
    """Give every process the whole parameters, until the next backward pass is over. Without fsdp nothing happens."""
    for part in shards(model):
        part.unshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every process has the whole parameters within the context."""
    gather_parameters(model)
    try:
        yield
    finally:
        for part in shards(model):
            part.reshard()


@contextmanager
def accumulating(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only after the last micro-batch of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    for part in shards(wrapped) if not isinstance(wrapped, DistributedDataParallel) else ():
        part.set_requires_gradient_sync(last, recurse=False)
        part.set_reshard_after_backward(last, recurse=False)
    yield
