"""What comes with a call: keywords, caches under two names, masks, positions, documents."""

import copy
import warnings

import pytest
import torch
from helpers import close, one_line_error, shaken, tiny_model, token_ids
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.models.auto import modeling_auto

from deep_delta import DeepDeltaForCausalLM
from deep_delta.model.inputs import FOR_ATTENTION, WITHOUT_EFFECT
from deep_delta.model.versions import NEWEST_TESTED, warn_if_untested

FP32 = 1e-5
VARIANTS = ("additive", "ddl-scalar", "ddl-cc", "ddl-tc")
CONVOLUTIONS = ("ddl-cc", "ddl-tc", "ddl-tc-no-ec", "additive-ec")
LENGTHS = [5, 1, 6]
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_order = pytest.mark.parametrize("qk_norm", ["before_rope", "after_rope"])


def model_of(variant: str, **options) -> DeepDeltaForCausalLM:
    return shaken(tiny_model(variant, **options), 0.15)


# --- keywords ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("past_key_value", "past_key_values"),
        ("caches", "cache"),
        ("atention_mask", "attention_mask"),
        ("positions_ids", "position_ids"),
        ("kv_cache", None),
        ("nonsense", None),
    ],
)
def test_keyword_that_nobody_sends_is_an_error(keyword, meant):
    """A cache under a third name must not be taken for an option of attention."""
    model = model_of("ddl-scalar")
    for called in (model, model.model):
        with pytest.raises(TypeError, match=keyword) as caught:
            called(token_ids(1, 3), **{keyword: None})
        assert "\n" not in str(caught.value)
        assert meant is None or f"did you mean {meant!r}" in str(caught.value)


@pytest.mark.parametrize("keyword", ["token_type_ids", "cache_position", "logits_indices"])
@torch.no_grad()
def test_keyword_that_somebody_sends_changes_nothing(keyword):
    ids, model = token_ids(2, 4), model_of("ddl-cc")
    assert torch.equal(model(ids, **{keyword: torch.zeros_like(ids)}).logits, model(ids).logits)


def test_every_known_keyword_says_who_sends_it():
    assert all(FOR_ATTENTION.values())
    assert all(WITHOUT_EFFECT.values())
    assert not FOR_ATTENTION.keys() & WITHOUT_EFFECT.keys()


@every_variant
@torch.no_grad()
def test_cache_goes_by_both_names(variant):
    model, ids = model_of(variant), token_ids(1, 8)
    full = model(ids).logits
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        for chunk, expected in zip(ids.split(4, 1), full.split(4, 1), strict=True):
            out = model(chunk, **{name: cache})
            close(out.logits, expected, atol=FP32)
            assert out.past_key_values is cache
    other = DynamicCache(config=model.config)
    one_line_error(lambda: model(ids, past_key_values=cache, cache=other), "two names")
    one_line_error(lambda: model(ids, past_key_values=((1, 2),)), "DynamicCache", "tuple")


@pytest.mark.parametrize(
    ("version", "warns"), [("6.0.0", True), ("5.99.1", True), ("5.17.0", False)]
)
def test_transformers_newer_than_tested_warns(version, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_untested(version)
        warn_if_untested(f"{NEWEST_TESTED}.3")
    assert len(caught) == warns
    assert all(NEWEST_TESTED in str(w.message) and version in str(w.message) for w in caught)


# --- the loss, by others' means -----------------------------------------------------------------


def test_known_by_name_where_transformers_looks():
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names["deep_delta"] == "DeepDeltaForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["deep_delta"] == "DeepDeltaModel"


@pytest.mark.parametrize("tied", [True, False])
def test_resized_head_keeps_the_loss_without_logits(tied):
    model = model_of("ddl-scalar", tie_word_embeddings=tied)
    model.resize_token_embeddings(64)
    ids = token_ids(2, 6, 64)
    expected = model(ids, labels=ids).loss
    out = model(ids, labels=ids, skip_logits=True)
    assert out.logits is None
    close(out.loss, expected, atol=1e-6)


def test_wrapped_head_is_called_for_the_loss():
    """As adapters and quantisation wrap it: what the wrapper adds belongs to the loss."""

    class Doubled(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden, *args, **kwargs):
            return 2 * self.head(hidden, *args, **kwargs)

    model, ids = model_of("ddl-scalar"), token_ids(2, 6)
    model.lm_head = Doubled(model.lm_head)
    out = model(ids, labels=ids, skip_logits=True)
    assert out.logits is None
    assert out.loss.shape == ()
    close(out.loss, model(ids, labels=ids).loss, atol=1e-6)


# --- positions and documents --------------------------------------------------------------------


@every_order
@every_variant
@torch.no_grad()
def test_positions_come_from_the_mask(variant, qk_norm):
    """A plain pass with left padding is the text alone: a norm after RoPE would feel a shift."""
    model, ids = model_of(variant, qk_norm=qk_norm), token_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = model(ids, attention_mask=mask).logits
    close(logits[0], model(ids[:1]).logits[0], atol=FP32)
    close(logits[1, 4:], model(ids[1:, 4:]).logits[0], atol=FP32)
    cache, parts = DynamicCache(config=model.config), []
    for end in range(1, 11):  # a chunk of one token may be padding
        part = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(part.logits)
    close(torch.cat(parts, 1)[mask.bool()], logits[mask.bool()], atol=FP32)


def block_diagonal(padding: int = 0) -> Tensor:
    """(1, 1, T, T) bool: causal within documents, without the first `padding` tokens."""
    mask = (SEGMENTS[:, None] == SEGMENTS).tril()
    mask[:, :padding] = False
    return mask[None, None]


def packed(form: str) -> dict:
    """Three documents in a row of 12 tokens, said in one of the ways that there are."""
    mask = block_diagonal()
    ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    return {
        "bool mask": {"attention_mask": mask},
        "float mask": {
            "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
        },
        "infinite mask": {
            "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        },
        "positions": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
        "seq_idx": {"seq_idx": SEGMENTS[None].int()},
        "lengths": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6},
    }[form]


@pytest.mark.parametrize(
    "form", ["bool mask", "float mask", "infinite mask", "positions", "seq_idx", "lengths"]
)
@every_order
@every_variant
@torch.no_grad()
def test_packed_documents_are_separate_however_they_are_said(variant, qk_norm, form):
    model, ids = model_of(variant, qk_norm=qk_norm), token_ids(1, 12)
    separate = torch.cat([model(document).logits for document in ids.split(LENGTHS, 1)], 1)
    close(model(ids, use_cache=False, **packed(form)).logits, separate, atol=FP32)


@pytest.mark.parametrize("variant", CONVOLUTIONS)
@torch.no_grad()
def test_mask_of_four_dimensions_with_padding(variant):
    """Whether the rows of padding are empty or not."""
    model, ids = model_of(variant), token_ids(1, 12)
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in ((3, 5), (5, 6), (6, 12))], 1)
    mask = block_diagonal(padding=3)
    close(model(ids, attention_mask=mask).logits[:, 3:], alone, atol=FP32)
    mask[..., :3, 0] = True
    close(model(ids, attention_mask=mask).logits[:, 3:], alone, atol=FP32)


def hole(mask: Tensor) -> Tensor:
    mask[..., 11, 8] = False
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        hole(block_diagonal()),
        torch.ones(1, 1, 12, 12, dtype=torch.bool),
        torch.eye(12, dtype=torch.bool)[None, None].flip(-1),
        torch.ones(12, 12).tril().triu(-3).bool()[None, None],
    ],
    ids=["hole", "both ways", "no order", "window"],
)
@torch.no_grad()
def test_mask_that_convolutions_cannot_follow_is_refused(mask):
    ids = token_ids(1, 12)
    for variant in CONVOLUTIONS:
        one_line_error(
            lambda v=variant: model_of(v)(ids, attention_mask=mask), "documents", "position_ids"
        )
    assert model_of("ddl-scalar")(ids, attention_mask=mask).logits.shape == (1, 12, 61)


@pytest.mark.parametrize("variant", CONVOLUTIONS)
@torch.no_grad()
def test_mask_of_four_dimensions_with_a_cache(variant):
    """One document goes on; what lies behind a border would be seen by the convolutions."""
    model, ids = model_of(variant), token_ids(1, 12)
    full = model(ids).logits
    cache = DynamicCache(config=model.config)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    first = model(ids[:, :7], attention_mask=causal[..., :7, :7], past_key_values=cache).logits
    copied = copy.deepcopy(cache)
    rest = model(ids[:, 7:], attention_mask=causal[..., 7:, :], past_key_values=cache).logits
    close(torch.cat([first, rest], 1), full, atol=FP32)
    border = causal.clone()
    border[..., 7:, :7] = False
    one_line_error(
        lambda: model(ids[:, 7:], attention_mask=border[..., 7:, :], past_key_values=copied),
        "documents",
    )
    fresh = DynamicCache(config=model.config)
    one_line_error(
        lambda: model(ids, attention_mask=block_diagonal(), past_key_values=fresh), "cache"
    )


@torch.no_grad()
def test_mask_of_an_unknown_kind_is_refused():
    one_line_error(
        lambda: model_of("ddl-tc")(token_ids(1, 3), attention_mask="causal"), "str", "(B, T)"
    )


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("static", [False, True])
@every_variant
@torch.no_grad()
def test_mask_may_be_wider_than_what_was_seen(variant, static, ahead):
    """As wide as a static cache, of whatever stands there; with padding on the left or not."""
    model, ids = model_of(variant, qk_norm="after_rope"), token_ids(2, 12)
    mask = torch.full((2, 20), ahead)
    mask[:, :12], mask[1, :3] = 1, 0
    expected = model(ids, attention_mask=mask[:, :12]).logits
    for wide in (mask, four_dimensional(mask)):
        cache = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(config=model.config, max_cache_len=20)
        logits = []
        for start, end in ((0, 6), (6, 7), (7, 12)):
            seen = wide[:, :, start:end] if wide.ndim == 4 else wide
            if not static and wide.ndim == 4:  # attention wants these to fit
                seen = seen[..., :end]
            out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache)
            logits.append(out.logits)
        close(torch.cat(logits, 1)[mask[:, :12].bool()], expected[mask[:, :12].bool()], atol=FP32)


def four_dimensional(mask: Tensor) -> Tensor:
    """(B, 1, S, S) bool, causal, without the padding of a mask (B, S)."""
    columns = mask.shape[1]
    return torch.ones(columns, columns, dtype=torch.bool).tril() & mask[:, None, None].bool()


@every_variant
@torch.no_grad()
def test_padding_in_four_dimensions_goes_on_with_a_cache(variant):
    model, ids = model_of(variant, qk_norm="after_rope"), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    whole = four_dimensional(mask)
    first = model(ids[:, :7], attention_mask=whole[:, :, :7, :7], use_cache=True)
    rest = model(ids[:, 7:], attention_mask=whole[:, :, 7:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, rest.logits], 1)
    close(logits[mask.bool()], expected[mask.bool()], atol=FP32)


@every_variant
@torch.no_grad()
def test_bias_and_other_patterns_are_no_documents(variant):
    """A soft mask, and one that hides the token before: positions stay, convolutions refuse."""
    model, ids = model_of(variant, qk_norm="after_rope"), token_ids(1, 12)
    index = torch.arange(12)
    distance = index[:, None] - index
    soft = torch.zeros(12, 12).masked_fill(distance < 0, float("-inf")) - 0.1 * distance.abs()
    dilated = (distance >= 0) & (distance != 1)
    for mask in (soft[None, None], dilated[None, None]):

        def call(mask=mask, **given):
            return model(ids, attention_mask=mask, use_cache=False, **given).logits

        if model.config.convolves:
            one_line_error(call, "documents")
        else:
            close(call(), call(position_ids=index[None]), atol=FP32)


@torch.no_grad()
def test_one_row_of_positions_serves_a_batch():
    ids = token_ids(2, 12)
    positions = packed("positions")["position_ids"]
    for variant in VARIANTS:
        model = model_of(variant)
        expected = model(ids, position_ids=positions.expand(2, -1), use_cache=False).logits
        close(model(ids, position_ids=positions, use_cache=False).logits, expected, atol=FP32)


@torch.no_grad()
def test_mask_that_does_not_fit_is_one_line():
    model, ids = model_of("ddl-scalar"), token_ids(2, 4)
    cache = model(ids, use_cache=True).past_key_values
    one_line_error(
        lambda: model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache), "4", "8"
    )
    one_line_error(lambda: model(ids, attention_mask=torch.ones(2, 4, 4)), "(2, 4, 4)")
    one_line_error(lambda: model(ids, past_key_values=ids), "Tensor", "DynamicCache")


# --- hidden states ------------------------------------------------------------------------------


@every_variant
def test_hidden_states_are_on_the_way_of_the_gradients_with_one_channel(variant):
    model, ids = model_of(variant), token_ids(1, 5)
    plain = model(ids).logits
    out = model(ids, output_hidden_states=True)
    close(out.logits, plain, atol=FP32)
    for hidden in out.hidden_states:
        assert hidden.shape == (1, 5, 32)
        hidden.retain_grad()
    out.logits.square().sum().backward()
    on_the_way = [hidden.grad is not None for hidden in out.hidden_states]
    assert on_the_way == [model.config.value_channels == 1] * 2 + [True]


@torch.no_grad()
def test_hidden_states_by_number():
    model, ids = model_of("ddl-cc"), token_ids(1, 5)
    all_of_them = model(ids, output_hidden_states=True).hidden_states
    some = model(ids, output_hidden_states=[0, 2]).hidden_states
    assert some[1] is None
    assert torch.equal(some[0], all_of_them[0])
    assert torch.equal(some[2], all_of_them[2])
    assert model(ids).hidden_states is None


# --- compiled and exported ----------------------------------------------------------------------


@every_variant
@torch.no_grad()
@pytest.mark.slow
def test_traced_call_with_positions_returns_its_cache(variant):
    """While a graph is traced nobody knows whether positions restart; a cache was asked for."""
    model, ids = model_of(variant), token_ids(1, 9)
    full = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    for length in (2, 6):  # shorter than the convolutions, and longer
        positions = torch.arange(length)[None]
        out = compiled(ids[:, :length], position_ids=positions, use_cache=True)
        close(out.logits, full[:, :length], atol=FP32)
        rest = model(ids[:, length:], past_key_values=out.past_key_values)
        close(rest.logits, full[:, length:], atol=FP32)


@pytest.mark.parametrize("variant", ["additive", "ddl-cc", "ddl-tc"])
def test_export_with_a_cache_is_refused_where_it_would_decode_wrongly(variant):
    """Executorch and others register keys and values alone: histories would be constants."""
    model, ids = model_of(variant), token_ids(1, 4)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(ids, past_key_values=cache)  # its tensors exist, as exporters want it
        cache.reset()

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, past_key_values=cache).logits

    if not model.config.convolves:
        torch.export.export(Decoder(), (ids,), strict=False)
        return
    with pytest.raises(ValueError, match="use_cache=False"):
        torch.export.export(Decoder(), (ids,), strict=False)
