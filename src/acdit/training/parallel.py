"""How the processes of a run share its work: by DDP (through accelerate) or by FSDP2, on one process too.

Under "ddp" every process holds the whole weights; under "fsdp2" each holds its rows of every weight, average and
moment, and a layer is whole only while it computes. Nothing else of the run knows which of the two it is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from acdit.model import ACDiTTransformer
from acdit.processes import Processes, leave, peers_needed
from acdit.recipe import Recipe
from acdit.recompute import checkpoint_elementwise


class Parallel:
    """This process among the run's processes.

    Args:
        recipe: `train.parallel` and `train.timeout_seconds` are read.

    Raises:
        PeerLostError: the others did not come within the timeout.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sharded = recipe.train.parallel == "fsdp2"
        """Each process holds rows of the weights only."""
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        timeout = timedelta(seconds=recipe.train.timeout_seconds)
        # Processor tensors (flags, file names, errors) go over gloo on every machine.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with self.peers():
            if self.world_size > 1 and "RANK" in os.environ and not distributed.is_initialized():
                # Before accelerate does it: it would pass over a timeout that happens to be its own default.
                distributed.init_process_group(backend, timeout=timeout)
                atexit.register(leave)
            # accelerate keeps its precision for the whole process: autocast is entered per run instead.
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.device = self._accelerator.device
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.processes = Processes(self.rank, self.world_size, self._accelerator.local_process_index)
        self.main = self.processes.is_first
        if self.sharded and not distributed.is_initialized():  # FSDP2 wants a group, be it of one
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
            atexit.register(leave)

    @property
    def gradient_scale(self) -> float:
        """What a process's share of the mean loss is multiplied with: DDP averages gradients, our FSDP2 sums them."""
        return 1.0 if self.sharded else float(self.world_size)

    # --- the model -----------------------------------------------------------------------------------------------

    def place(self, model: ACDiTTransformer) -> ACDiTTransformer:
        """The model on its device, with the recipe's gradient checkpointing; under FSDP2 cut into shards.

        To be called before the optimizer and the averages are made: they follow the shards.
        """
        mode = self.recipe.train.gradient_checkpointing
        if self.sharded:
            return self._shard(model, mode)
        model = model.to(self.device)
        if mode == "elementwise":
            model.enable_gradient_checkpointing(checkpoint_elementwise)
        elif mode == "layers":
            model.enable_gradient_checkpointing()
        return model

    def _shard(self, model: ACDiTTransformer, mode: str) -> ACDiTTransformer:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for layer in model.layers:
            # Checkpointing, then compilation, then shards: what fetches a layer's weights stays outside the other two.
            forward: Callable[..., Tensor] = layer.forward
            if mode == "elementwise":
                forward = functools.partial(checkpoint_elementwise, forward)
            elif mode == "layers":
                forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            if self.recipe.train.compile:
                forward = torch.compile(forward)
            layer.forward = forward
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # The model returns a view of its last product; the loss makes nothing of it in place, which torch warns about.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A plain sum: every backend has it, and `gradient_scale` makes it the mean over the global batch.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def wrap(self, model: nn.Module) -> Any:
        """What training calls: DDP's wrapper or the model itself, compiled if the recipe says so."""
        if self.sharded:
            return model
        wrapped = self._accelerator.prepare(model)
        if self.recipe.train.compile:
            wrapped.compile()
        return wrapped

    @contextlib.contextmanager
    def accumulating(self, model: Any, last: bool) -> Iterator[None]:
        """Around a micro-batch: only the last one's backward brings the processes' gradients together."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
            yield
        else:
            with contextlib.nullcontext() if last else self._accelerator.no_sync(model):
                yield

    def clip(self, model: nn.Module, limit: float | None) -> float:
        """Scale the gradients to the norm `limit` at most; the norm of the whole gradient before."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit, foreach=True)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # --- the other processes -------------------------------------------------------------------------------------

    def peers(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a broken connection to another process becomes a `PeerLostError`."""
        if self.world_size == 1:
            return contextlib.nullcontext()
        return peers_needed(
            f"an answer within train.timeout_seconds={self.recipe.train.timeout_seconds}",
            "read the other processes' messages; then start all of them again with --resume",
        )
