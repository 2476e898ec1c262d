"""Which sequences a step trains on, and their tensors on the device."""

import torch
from torch import Tensor

from deep_delta.data.shards import IGNORED_LABEL, PackedSequences

Batch = dict[str, Tensor]


class Order:
    """As accelerate's seedable sampler orders them: an epoch at a time, whole batches only."""

    def __init__(self, sequences: int, batch_size: int, seed: int):
        self.whole = sequences - sequences % batch_size
        self.batch_size, self.seed, self.epoch = batch_size, seed, -1
        self.order: list[int] = []

    def __call__(self, step: int) -> list[int]:
        """The sequences of a step, counted from 0."""
        epoch, place = divmod(step, self.whole // self.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.epoch = epoch
            self.order = torch.randperm(self.whole, generator=generator).tolist()
        return self.order[place * self.batch_size : (place + 1) * self.batch_size]


def collate(data: PackedSequences, sequences: list[int], device: torch.device) -> Batch:
    """The sequences' items stacked on a device, (B, T) each; a copy to a GPU is not waited for."""
    items = [data[index] for index in sequences]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    if device.type == "cuda":
        return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}
    return {name: x.to(device) for name, x in batch.items()}


def predictions(batch: Batch) -> Tensor:
    """How many tokens of a batch are predicted; the first of a sequence never is."""
    return (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
