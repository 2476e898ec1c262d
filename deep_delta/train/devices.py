"""On what a recipe trains: device, precision, processes, and what wraps the model."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from deep_delta.errors import UserError
from deep_delta.train.recipe import Recipe


def can_shard(devices: int) -> bool:
    """Whether FSDP2 can run; on CPUs accelerate would silently take DDP instead."""
    return devices > 1 and torch.cuda.is_available()


@dataclass(frozen=True)
class Devices:
    """The devices of a run and how its batches are shared among them.

    accelerator: of this process, with the group of all that torchrun started.
    micro_batch: sequences of one forward pass of one process.
    passes: forward passes of one process in a step.
    bf16: whether passes are autocast to bfloat16.
    """

    accelerator: Accelerator
    micro_batch: int
    passes: int
    bf16: bool

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Not accelerate's, whose precision cannot change within a process: a comparison's may.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def check_wrapper(self, model: Any, parallel: str) -> None:
        """UserError unless what the recipe asks for is what wraps the model."""
        wrapper = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[parallel]
        if self.accelerator.num_processes > 1 and not isinstance(model, wrapper):
            raise UserError(
                f"the recipe says parallel: {parallel}, but the model is wrapped in "
                f"{type(model).__name__}: check the launcher's own settings"
            )


def find_devices(recipe: Recipe) -> Devices:
    """Take this process's device and meet the other processes.

    UserError where the recipe does not fit their number or kind.
    """
    cuda = torch.cuda.is_available()
    plugin = None
    if recipe.parallel == "fsdp2":
        # Parameters stay fp32 where they are computed with, and autocast decides as ever: rounding
        # them all would also round gates, norms and the gradients' sums.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            mixed_precision_policy=MixedPrecisionPolicy(),
            cpu_ram_efficient_loading=False,
        )
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, fsdp_plugin=plugin)
    devices = accelerator.num_processes
    if plugin is not None and not can_shard(devices):
        raise UserError(
            "parallel: fsdp2 needs several processes, which torchrun starts, and a GPU for each: "
            "else set parallel to ddp"
        )
    if recipe.cuda_graphs and not (cuda and devices == 1):
        where = f"there are {devices} processes" if cuda else "there is none here"
        raise UserError(f"cuda_graphs needs one process and a GPU, and {where}: set it to false")
    micro = recipe.micro_batch_size or recipe.batch_size // devices
    passes, rest = divmod(recipe.batch_size, micro * devices) if micro else (0, 1)
    if rest or not passes:
        raise UserError(
            f"batch_size {recipe.batch_size} is not a multiple of micro_batch_size {micro} "
            f"times {devices} device(s)"
        )
    able = cuda and torch.cuda.is_bf16_supported()
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and able)
    return Devices(accelerator, micro, passes, bf16)
