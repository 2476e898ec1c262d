"""Next-token cross-entropy from hidden states and the head's weight: the logits stay inside.

At 32,768 tokens and a vocabulary of 50,304 the logits are 3.3 GB in bf16 and 6.6 GB in fp32, more
than the rest of a small model together. Two implementations that agree, by name in `LOSSES`.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LinearCrossEntropy = Callable[..., Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    shift_labels: Tensor | None = None,
    multiplier: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The mean over predictions of −log softmax(multiplier · hidden weightᵀ)[next token], in nats.

    Value and gradient are those of transformers' causal loss on the same logits. Compiled, it holds
    the logits and then, in their place, their gradient, both in autocast's dtype; uncompiled it
    also holds fp32 copies.

    Args:
        hidden: (B, T, d), any floating dtype.
        weight: (V, d).
        labels: (B, T), the input ids themselves: they are shifted here.
        num_items_in_batch: the loss becomes sum / num_items_in_batch.
        shift_labels: (B, T), labels that are already shifted, in place of `labels`.
        multiplier: factor on the logits.
        ignore_index: the label of a token that is not to be predicted.

    Returns:
        A scalar, in at least fp32; NaN for the mean over no prediction at all.

    Raises:
        ValueError: neither labels nor shift_labels, or labels of another shape than (B, T).
    """
    targets = _targets(hidden, labels, shift_labels, ignore_index)
    logits = F.linear(hidden, weight).flatten(0, -2)
    if multiplier != 1:
        logits = logits * multiplier
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Of the formulations tried, the one that compiles best: torch.compile turns the scatter of its
    # backward pass into a comparison and writes the gradient over the saved logits. The gradient
    # of logsumexp minus a gathered logit is scattered into an fp32 tensor of the logits' size.
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return _mean(total, targets, num_items_in_batch, ignore_index)


def liger_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    shift_labels: Tensor | None = None,
    multiplier: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` by liger-kernel, which never holds more than a few rows of logits.

    It computes the gradients in the forward pass, chunk by chunk; the weight's is summed in fp32.

    Raises:
        ValueError: as `linear_cross_entropy`; or no liger-kernel, or tensors that are not on a GPU.
    """
    _check_liger(hidden.device)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    targets = _targets(hidden, labels, shift_labels, ignore_index)
    hidden = hidden.flatten(0, -2) * multiplier  # before it is rounded to autocast's dtype
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # which leaves the arguments of a custom function alone
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        weight = weight.to(hidden.dtype)
    fused = LigerFusedLinearCrossEntropyLoss(
        ignore_index=ignore_index, reduction="sum", accum_dtype=torch.float32
    )
    return _mean(fused(weight, hidden, targets), targets, num_items_in_batch, ignore_index)


LOSSES: dict[str, LinearCrossEntropy] = {
    "torch": linear_cross_entropy,
    "liger": liger_linear_cross_entropy,
}


def resolve_loss(name: str, device: torch.device) -> LinearCrossEntropy:
    """The implementation of that name, if it can run on tensors of that device.

    Raises:
        ValueError: an unknown name, a package that is not installed, or no GPU for "liger".
    """
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}; choose one of {', '.join(LOSSES)}")
    if name == "liger":
        _check_liger(device)
    return LOSSES[name]


def _check_liger(device: torch.device) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "the loss 'liger' needs liger-kernel: pip install 'deep-delta-learning[liger]'"
        )
    # Triton's interpreter runs the kernels on CPU tensors, which is how they are tested.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the loss 'liger' runs on a GPU only: choose 'torch' on a CPU")


def _targets(
    hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int
) -> Tensor:
    """What each token predicts, (B·T,).

    The labels are shifted, not the logits: the last token of a row predicts nothing, where slicing
    it off would copy the logits.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("the loss needs labels or shift_labels")
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if shift_labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(shift_labels.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}"
        )
    return shift_labels.flatten().to(hidden.device)


def _mean(
    total: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | float | None,
    ignore_index: int,
) -> Tensor:
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
