"""Which sequences a step trains on, and their tensors on the device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deep_delta.data.shards import IGNORED_LABEL, PackedSequences

Batch = dict[str, Tensor]

ROUNDS = 10
# Odd constants of a multiplicative hash, whose high bits depend on all bits of what is multiplied.
MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


class Order:
    """The sequences of each step: a pure function of seed and step.

    Epochs follow each other without a gap, each in an order of its own that has every sequence
    once. No order is kept: a step's sequences are computed, however many there are.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int):
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed

    def __call__(self, step: int) -> list[int]:
        """The `batch_size` sequences of a step, counted from 0."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.uint64)
        epochs, places = np.divmod(places, np.uint64(self.sequences))
        found: list[int] = []
        for epoch in np.unique(epochs):
            seeds = np.random.SeedSequence([self.seed, int(epoch)])
            keys = seeds.generate_state(ROUNDS, np.uint64).astype(np.uint64)
            found += permuted(places[epochs == epoch], self.sequences, keys).tolist()
        return found


def permuted(
    places: npt.NDArray[np.uint64], count: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Where a pseudorandom permutation of 0 ... count - 1 takes some of them.

    A Feistel network permutes the numbers of twice `half` bits, fewer than 4 · count; what falls
    outside goes through it again until it falls inside, which keeps it a permutation.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    left_out = np.ones(len(places), dtype=bool)
    result = places.copy()
    while left_out.any():
        left, right = result[left_out] >> half, result[left_out] & mask
        for key in keys:
            mixed = (right ^ key) * MIX[0]
            mixed = (mixed ^ (mixed >> np.uint64(32))) * MIX[1]
            left, right = right, left ^ (mixed >> np.uint64(40) & mask)
        result[left_out] = left << half | right
        left_out = result >= count
    return result


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
