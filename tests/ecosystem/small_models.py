"""Small models, texts and batches for the tools that people bring."""

from pathlib import Path

import torch
from helpers import shaken, tiny_model, token_ids
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from deep_delta import DeepDeltaForCausalLM
from deep_delta.data import bundled_tokenizer

FOUR = ("additive", "ddl-scalar", "ddl-cc", "ddl-tc")
FP32 = 2e-5  # logits of size 1 to 10, summed in another order

TEXTS = (
    "The river runs over the old stone.",
    "A light.",
    "Quiet water walks under the bridge and sings to the moon, and nobody hears it.",
    "She said that the stone was old.",
    "Under the light a river, under the river a stone.",
    "And so on.",
)


def small_model(variant: str, **overrides) -> DeepDeltaForCausalLM:
    """Two layers, 32 wide, 61 tokens; no parameter at its neutral start."""
    return shaken(tiny_model(variant, **overrides), 0.1)


def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(bundled_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_model(variant: str, **overrides) -> DeepDeltaForCausalLM:
    """A small model for the bundled tokenizer's tokens."""
    words = tokenizer()
    return small_model(
        variant,
        vocab_size=len(words),
        max_position_embeddings=128,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        **overrides,
    )


def text_checkpoint(folder: Path, variant: str) -> DeepDeltaForCausalLM:
    """The model that the folder then holds, with its tokenizer."""
    model = text_model(variant)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def train(model: nn.Module, steps: int = 3, lr: float = 0.01, **batch) -> list[float]:
    """The losses of a few steps of Adam on one batch."""
    ids = token_ids(2, 10)
    batch = {"input_ids": ids, "labels": ids, **batch}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: PreTrainedModel | nn.Module, ids: Tensor | None = None) -> Tensor:
    return model.eval()(token_ids(2, 10) if ids is None else ids).logits
