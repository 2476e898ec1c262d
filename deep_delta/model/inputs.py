"""What comes with a call of the model beside tokens: keywords, masks, positions, documents."""

import difflib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.versions import CACHE

# Keywords that may come in `**kwargs`, and who sends them. Any other is an error: transformers
# renames its own from time to time, and a cache under another name was once taken for an option of
# attention, so that every cached text was wrong without a word.
FOR_ATTENTION = {
    "cu_seq_lens_q": "DataCollatorWithFlattening, TRL without padding, continuous batching",
    "cu_seq_lens_k": "the same",
    "max_length_q": "the same",
    "max_length_k": "the same",
    "max_seqlen_q": "continuous batching",
    "max_seqlen_k": "continuous batching",
    "read_index": "continuous batching",
    "write_index": "continuous batching",
    "block_table": "continuous batching",
    "is_causal": "continuous batching",
}
WITHOUT_EFFECT = {
    "token_type_ids": "tokenizers and pipelines; all tokens are of one kind here",
    "seq_idx": "DataCollatorWithFlattening; read by `documents_start`",
    "cache_position": "exporters; the cache knows how much it has seen",
    "logits_indices": "continuous batching, which picks the logits itself",
    "logits_processor_args": "continuous batching",
    "output_attentions": "transformers' capture of outputs, which reads it before",
    "num_items_in_batch": "Trainer; read by the loss",
    "shift_labels": "Trainer; read by the loss",
    "ignore_index": "users; read by the loss",
}


def for_attention(keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that attention takes.

    Raises:
        TypeError: a keyword that nobody is known to send.
    """
    for name in keywords:
        if name not in FOR_ATTENTION and name not in WITHOUT_EFFECT:
            known = ("attention_mask", "position_ids", "past_key_values", "cache", "labels",
                     *FOR_ATTENTION, *WITHOUT_EFFECT)  # fmt: skip
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"the model does not know the keyword {name!r}{hint}")
    return {name: value for name, value in keywords.items() if name in FOR_ATTENTION}


def one_of(past_key_values: Any, cache: Any) -> Any:
    """The cache, which may come under either name.

    Raises:
        ValueError: two different ones, or tuples of keys and values.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one thing: give one of them")
    given = cache if past_key_values is None else past_key_values
    if isinstance(given, tuple | list):
        raise ValueError("a cache must be a transformers Cache, such as DynamicCache, not a tuple")
    return given


def cache_keyword(cache: Any) -> dict[str, Any]:
    """The cache under the name by which attention takes it.

    That of continuous batching is no `Cache` and always called `cache`.
    """
    return {CACHE if cache is None or isinstance(cache, Cache) else "cache": cache}


class Seen(NamedTuple):
    """What attention and the convolutions over tokens may see in one call."""

    mask: Any  # for attention: (B, heads, T, S), or whatever its implementation takes
    positions: Tensor  # (B, T)
    tokens: Tensor | None  # (B, T), 0 for padding
    segments: Tensor | None  # (B, T), the number of each token's document
    may_be_continued: bool  # by a cache: packed documents have no common end


def what_is_seen(
    config: DeepDeltaConfig,
    embeddings: Tensor,
    mask: Any,
    positions: Tensor | None,
    cache: Any,
    keywords: dict[str, Any],
) -> Seen:
    """Masks, positions, padding and documents of a call.

    Args:
        embeddings: (B, T, d).
        mask: (B, S) with 0 for padding; (B, heads, T, S) as attention takes it; the dict of masks
            that `generate` prepares for a static cache; what an implementation of attention takes
            otherwise; or None.
        positions: (B, T) or None.
        cache: of earlier tokens, or None.
        keywords: what else came, of which documents can be told.

    Raises:
        ValueError: a mask that convolutions over tokens cannot follow.
    """
    batch, length = embeddings.shape[:2]
    convolves = config.convolves
    begins = None
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == length:
        begins = starts_from_allowed(allowed(mask))
    elif mask is None and cache is None:
        begins = documents_start(keywords, batch, length)
    tokens = segments = None
    if isinstance(mask, dict):
        tokens = mask.get("linear_attention")
    elif mask is None:
        if positions is None and begins is not None:
            positions = positions_from_starts(begins)
        if positions is not None and cache is None:
            segments = find_packed_sequence_indices(positions)
    elif not isinstance(mask, Tensor):
        if convolves:
            raise ValueError(
                f"a mask of type {type(mask).__name__} does not say what the convolutions over "
                "tokens may see: give attention_mask (B, T)"
            )
    elif mask.ndim == 2:
        tokens = token_mask(mask, length) if convolves else None
    elif convolves:
        segments, tokens = read_documents(mask)
        if segments is not None and cache is not None:
            raise ValueError("a mask with several documents cannot be continued by a cache")
    masks = attention_masks(config, embeddings, mask, positions, cache)
    if positions is None and isinstance(mask, Tensor) and mask.ndim == 2:
        positions = positions_from_mask(mask, length)
    elif positions is None and begins is not None:
        positions = positions_from_starts(begins)
    elif positions is None:
        before = 0 if cache is None else cache.get_seq_length()
        positions = (torch.arange(length, device=embeddings.device) + before).unsqueeze(0)
    # While a graph is traced, nobody knows whether positions restart.
    may_be_continued = segments is None or is_traced()
    return Seen(masks, positions, tokens, segments, may_be_continued)


def attention_masks(
    config: DeepDeltaConfig, embeddings: Tensor, mask: Any, positions: Tensor | None, cache: Any
) -> Any:
    """What attention takes for a mask."""
    if isinstance(mask, dict):
        return mask["full_attention"]
    plain = mask is None and positions is None and cache is None
    if plain and config._attn_implementation == "sdpa":
        # Which is causal by itself; asked for a mask while a graph is traced or captured,
        # transformers makes one nevertheless, and attention gets slower by it.
        return None
    return create_causal_mask(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=mask,
        # Nobody need look for documents in positions of our own, which would wait for the GPU.
        position_ids=positions,
        **cache_keyword(cache),
    )


def documents_start(keywords: dict[str, Any], batch: int, tokens: int) -> Tensor | None:
    """(B, T) bool, true where a packed document begins, from what collators send beside tokens.

    None where they send nothing, or lengths of another batch than one flat row.
    """
    if (numbers := keywords.get("seq_idx")) is not None:
        return torch.diff(numbers, prepend=numbers[:, :1] - 1, dim=-1) != 0
    ends = keywords.get("cu_seq_lens_q")
    if batch != 1 or not isinstance(ends, Tensor):
        return None
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=ends.device)
    return starts.index_fill(0, ends.long(), True)[:tokens].unsqueeze(0)


def positions_from_starts(starts: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 at every start, starts (B, T) bool."""
    index = torch.arange(starts.shape[-1], device=starts.device).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(-1).values


def positions_from_mask(mask: Tensor, tokens: int) -> Tensor:
    """Positions (B, T) of the last T tokens of a mask (B, S): padding is not counted."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]


def is_traced() -> bool:
    """Whether a graph is traced, so that nobody may look at values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def token_mask(mask: Tensor, tokens: int) -> Tensor | None:
    """(B, T), 0 for padding, of the last T tokens of a mask (B, S); None where none is padding.

    While a graph is traced nobody may look, and the mask stays.
    """
    own = mask[:, -tokens:]
    return None if not is_traced() and bool(own.all()) else own.contiguous()


def allowed(mask: Tensor) -> Tensor:
    """Of a mask (B, heads, T, S) that attention takes, where it lets a token look: bool."""
    return mask if mask.dtype == torch.bool else mask == 0


def starts_from_allowed(may_look: Tensor) -> Tensor:
    """(B, T): the tokens that may not look at the one before them, may_look (B, heads, T, T)."""
    before = may_look[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
    return F.pad(~before, (1, 0), value=True)


def read_documents(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Documents and padding that a mask (B, heads, T, S) stands for: (segments, token mask).

    segments (B, T) number the documents along T, None for one; the token mask (B, T) is 0 for
    padding, None where there is none.

    Raises:
        ValueError: the mask is not causal attention within documents, which convolutions over
            tokens can follow.
    """
    may_look = allowed(mask)
    tokens, seen = may_look.shape[-2:]
    earlier = may_look[..., : seen - tokens]
    own = may_look[..., seen - tokens :]
    starts = starts_from_allowed(own)
    segments = starts.long().cumsum(-1)
    real = own[:, 0].diagonal(dim1=-2, dim2=-1)
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    expected = (same & real.unsqueeze(-2)).tril().unsqueeze(1)
    agrees = ((own == expected) | ~real[:, None, :, None]).all()
    if seen > tokens:  # what the cache keeps of earlier tokens is one document with these
        agrees = agrees & earlier.all() & own.tril().eq(own).all() & (segments == 1).all()
    if not bool(agrees):
        raise ValueError(
            "a mask of four dimensions must be causal attention within documents, because the "
            "convolutions over tokens must see the same: give attention_mask (B, T), or "
            "position_ids that restart at every document and use_cache=False"
        )
    one = bool((segments == 1).all())
    return None if one else segments, None if bool(real.all()) else real
