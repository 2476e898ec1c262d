"""What comes with a call of the model beside tokens: keywords, masks, positions, documents."""

import difflib
from collections.abc import Collection
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


def hidden_states_asked(
    config: DeepDeltaConfig, asked: bool | Collection[int] | None
) -> Collection[int]:
    """The numbers of the hidden states to return, 0 to num_hidden_layers: all, some or none."""
    if asked is None:
        asked = bool(config.output_hidden_states)
    if isinstance(asked, bool):
        return range(config.num_hidden_layers + 1) if asked else ()
    return asked


def one_of(past_key_values: Any, cache: Any) -> Any:
    """The cache, which may come under either name.

    Raises:
        ValueError: two different ones, or keys and values as they are.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one thing: give one of them")
    given = cache if past_key_values is None else past_key_values
    if isinstance(given, tuple | list | dict | Tensor):
        kind = type(given).__name__
        raise ValueError(
            f"a cache must be a transformers Cache, such as DynamicCache, not a {kind}"
        )
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
    nothing = mask is None and cache is None
    before = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if isinstance(mask, Tensor):
        mask = checked(mask, before, length).to(embeddings.device)
    own = torch.arange(length, device=embeddings.device) + before  # the columns of these tokens
    if nothing and positions is None:
        positions = positions_from_keywords(keywords, embeddings)
    tokens, segments = what_convolutions_see(mask, own) if config.convolves else (None, None)
    if nothing and positions is not None:
        segments = find_packed_sequence_indices(positions)
    elif segments is not None and cache is not None:
        raise ValueError("a mask with several documents cannot be continued by a cache")
    masks = attention_masks(config, embeddings, mask, positions, cache)
    if positions is None:
        positions = positions_from_mask(mask, own)
    # While a graph is traced, nobody knows whether positions restart.
    may_be_continued = segments is None or is_traced()
    segments = None if segments is None else segments.expand(batch, -1)
    return Seen(masks, positions, tokens, segments, may_be_continued)


def checked(mask: Tensor, before: int | Tensor, length: int) -> Tensor:
    """The mask, if it has a column for each of so many earlier and these tokens.

    Raises:
        ValueError: it has not, or another number of dimensions than two or four.
    """
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be (B, S) or (B, heads, T, S)"
        )
    if isinstance(before, int) and mask.shape[-1] < before + length:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns; with {before} tokens in the cache and "
            f"{length} new ones it must have {before + length}"
        )
    return mask


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


def positions_from_keywords(keywords: dict[str, Any], embeddings: Tensor) -> Tensor | None:
    """Positions (B, T) of packed documents, from what collators send beside tokens; or None."""
    batch, length = embeddings.shape[:2]
    if (numbers := keywords.get("seq_idx")) is not None:
        return positions_from_starts(torch.diff(numbers, prepend=numbers[:, :1] - 1) != 0)
    ends = keywords.get("cu_seq_lens_q")
    if batch != 1 or not isinstance(ends, Tensor):  # lengths are those of one flat row
        return None
    starts = torch.zeros(length + 1, dtype=torch.bool, device=ends.device)
    return positions_from_starts(starts.index_fill(0, ends.long(), True)[:length].unsqueeze(0))


def positions_from_mask(mask: Any, own: Tensor) -> Tensor:
    """Positions of the tokens whose columns are `own` (T,), (B, T) or (1, T).

    Padding is not counted, and documents count from 0 each, where the mask says what is which.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp_min(0).index_select(-1, own)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        found = read_documents(mask, own)
        return torch.where(found.agrees, found.positions, own)
    return own.unsqueeze(0)


def positions_from_starts(starts: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 at every start, starts (B, T) bool."""
    index = torch.arange(starts.shape[-1], device=starts.device).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(-1).values


def what_convolutions_see(mask: Any, own: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A token mask, 0 for padding, and document numbers, (B, T) each, None where there is one kind.

    Raises:
        ValueError: a mask that convolutions cannot follow.
    """
    if mask is None:
        return None, None
    if isinstance(mask, dict):  # of these tokens alone
        mask, own = mask.get("linear_attention"), own - own[0]
        return None if mask is None else token_mask(mask, own), None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"a mask of type {type(mask).__name__} does not say what the convolutions over tokens "
            "may see: give attention_mask (B, T)"
        )
    if mask.ndim == 2:
        return token_mask(mask, own), None
    found = read_documents(mask, own)
    if not bool(found.agrees):
        raise ValueError(
            "a mask of four dimensions must be causal attention within documents, because the "
            "convolutions over tokens must see the same: give attention_mask (B, T), or "
            "position_ids that restart at every document and use_cache=False"
        )
    return (
        None if bool(found.real.all()) else found.real,
        found.segments if bool(found.segments.any()) else None,
    )


def is_traced() -> bool:
    """Whether a graph is traced, so that nobody may look at values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def token_mask(mask: Tensor, own: Tensor) -> Tensor | None:
    """(B, T), 0 for padding: the columns `own` (T,) of a mask (B, S). None where none is padding.

    While a graph is traced nobody may look, and the mask stays. Padding inside a text stays in its
    place: attention leaves it out, and convolutions see zeros there.
    """
    tokens = mask.index_select(-1, own)
    return None if not is_traced() and bool(tokens.all()) else tokens


class Documents(NamedTuple):
    """What a mask (B, heads, T, S) means if it is causal attention within documents."""

    agrees: Tensor  # bool, whether it is that
    real: Tensor  # (B, T) bool, false for padding
    segments: Tensor  # (B, T), the number of each token's document, from 0 along T
    positions: Tensor  # (B, T), within the document, counting what came before T too


def read_documents(mask: Tensor, own: Tensor) -> Documents:
    """Documents and padding in a mask (B, heads, T, S) that attention takes.

    own (T,) are the columns of the tokens themselves. Those before are a cache's, which must be one
    document with them; those behind must be hidden. Nobody waits for the GPU here.
    """
    may_look = mask if mask.dtype == torch.bool else mask == 0
    column, row = torch.arange(mask.shape[-1], device=mask.device), own.unsqueeze(-1)
    first = may_look[:, 0]  # of all heads, which must be alike
    seen = first.index_select(-1, own)
    real = seen.diagonal(dim1=-2, dim2=-1)
    index = torch.arange(len(own), device=mask.device)
    previous = F.pad(torch.where(real, index, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
    follows = seen.gather(-1, previous.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    segments = (real & (previous >= 0) & ~follows).long().cumsum(-1)
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    expected = (same & real.unsqueeze(-2)).tril()
    past = first & (column < own[0])
    agrees = (may_look == first.unsqueeze(1)).all()
    agrees = agrees & ((seen == expected) | ~real.unsqueeze(-1)).all() & real.any(-1).all()
    # The last token sees of the past what all see, and something if there is any.
    agrees = agrees & ((past == past[:, -1:]) | ~real.unsqueeze(-1)).all()
    agrees = agrees & ((own[0] == 0) | ((segments == 0).all() & past[:, -1].any(-1).all()))
    agrees = agrees & ~(first & (column > row.amax())).any()
    if mask.dtype != torch.bool:  # a bias is more than a mask
        agrees = agrees & ((mask == 0) | (mask <= -1e4)).all()
    return Documents(agrees, real, segments, (first.sum(-1) - 1).clamp_min(0))
