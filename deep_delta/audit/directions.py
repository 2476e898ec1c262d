"""Do sublayers write along the same directions? Overlaps of k between all pairs of them."""

from typing import Any

import torch
from torch import Tensor

from deep_delta.audit.streams import SecondMoments


class Overlaps:
    """Mean of (k_iᵀk_j)² over tokens, for every pair of sublayers i, j.

    count: how many sublayers; directions of length 1 that have nothing to do with one another
    overlap by 1/d.
    """

    def __init__(self, count: int, device: torch.device):
        self.total = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, directions: list[Tensor]) -> None:
        """directions: k of every sublayer, each (B, T, d), of the same tokens."""
        for sequence in zip(*directions, strict=True):  # one at a time: the products are larger
            stacked = torch.stack(sequence, dim=1).double()  # (T, sublayers, d)
            self.total += (stacked @ stacked.mT).square().sum(0)
            self.tokens += len(stacked)

    def result(self, moments: list[SecondMoments]) -> dict[str, Any]:
        """For JSON: overlaps on the same token, and those of tokens drawn at random.

        moments: of each sublayer's k. E[(k_iᵀk_j)²] over independent tokens is tr(C_i C_j), so
        that what all tokens share can be told from what happens on one token.
        """
        means = torch.stack([one.total / max(self.tokens, 1) for one in moments]).flatten(1)
        return {
            "same_token": (self.total / max(self.tokens, 1)).tolist(),
            "other_token": (means @ means.mT).tolist(),
            "chance": 1 / moments[0].total.shape[0],
        }
