"""Padding, packing and caches change what is computed, never the result."""

import copy
import itertools

import pytest
import torch
from helpers import VARIANTS, close, one_line_error, shaken, tiny_model, token_ids
from torch import Tensor
from transformers import DynamicCache

# fp32 sums over other shapes round differently; logits here are of size 1 to 10.
FP32 = 1e-5

CASES = (*VARIANTS, "mlp-direction", "own-token-compressors", "three-channels-kernels-of-3")
every_case = pytest.mark.parametrize("case", CASES)


def model_and_logits(case: str, ids: Tensor):
    model = shaken(tiny_model(case), 0.1)
    return model, model(ids).logits


@every_case
@pytest.mark.parametrize(
    "chunks", [[10], [4, 6], [1] * 10, [5, 1, 1, 3]], ids=["prefill", "halves", "tokens", "mixed"]
)
@torch.no_grad()
def test_cached_chunks_equal_the_full_forward(case, chunks):
    """Chunks shorter than a kernel, and longer: each convolution has its own history."""
    ids = token_ids(2, 10)
    model, full = model_and_logits(case, ids)
    cache, logits = DynamicCache(config=model.config), []
    for chunk in ids.split(chunks, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
    close(torch.cat(logits, 1), full, atol=FP32)


@every_case
@torch.no_grad()
def test_left_padding_changes_nothing(case):
    ids = token_ids(2, 10)
    model = shaken(tiny_model(case), 0.1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = ids.where(mask.bool(), 7)
    # Positions count from the first real token, as `generate` does it.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    close(logits[0], model(ids[:1]).logits[0], atol=FP32)
    close(logits[1, 4:], model(ids[1:, 4:]).logits[0], atol=FP32)


@every_case
@torch.no_grad()
def test_left_padding_in_cached_chunks(case):
    """A second chunk that still begins with padding, and one that does not."""
    ids = token_ids(2, 10)
    model = shaken(tiny_model(case), 0.1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 3), (3, 6), (6, 7), (7, 10)):
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(out.logits)
    close(torch.cat(logits, 1)[mask.bool()], full[mask.bool()], atol=FP32)


@every_case
@torch.no_grad()
def test_right_padding_changes_nothing(case):
    ids = token_ids(2, 10)
    model, full = model_and_logits(case, ids)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    logits = model(ids.where(mask.bool(), 7), attention_mask=mask).logits
    close(logits[1, :6], full[1, :6], atol=FP32)


@every_case
@torch.no_grad()
def test_packed_documents_equal_separate_ones(case):
    """position_ids that restart say where a document begins; nothing crosses that line."""
    ids = token_ids(1, 12)
    model = shaken(tiny_model(case), 0.1)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    separate = [model(document).logits for document in ids.split(lengths, dim=1)]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    close(packed, torch.cat(separate, 1), atol=FP32)


@every_case
@torch.no_grad()
def test_logits_never_depend_on_later_tokens(case):
    ids = token_ids(1, 10)
    model, full = model_and_logits(case, ids)
    ids[:, 6:] = (ids[:, 6:] + 1) % 61
    changed = model(ids).logits
    close(changed[:, :6], full[:, :6], atol=FP32)
    assert (changed[:, 6:] - full[:, 6:]).abs().amax(-1).min() > 1e-3


@every_case
@torch.no_grad()
def test_generate_says_the_same_with_every_cache(case):
    model = shaken(tiny_model(case), 0.1)
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)
    # A row with padding continues as it does alone.
    alone = model.generate(ids[1:, 3:], **{**options, "attention_mask": mask[1:, 3:]})
    assert torch.equal(expected[1, 7:], alone[0, 4:])


@pytest.mark.parametrize("case", ["ddl-tc", "ddl-cc", "ddl-scalar"])
@torch.no_grad()
def test_beam_search_reorders_every_history(case):
    model = shaken(tiny_model(case), 0.1)
    ids = token_ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)  # a 0 among them is text
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )


@every_case
@torch.no_grad()
def test_prompts_shorter_than_a_kernel_in_any_chunks(case):
    """Prompts of 1, 2 and 3 tokens, and every way of cutting five more."""
    ids = token_ids(1, 6)
    model, full = model_and_logits(case, ids)
    for prompt, chunks in itertools.product((1, 2, 3), ([1] * 3, [2, 1], [3])):
        cache = DynamicCache(config=model.config)
        parts = ids[:, : prompt + 3].split([prompt, *chunks], dim=1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        close(logits, full[:, : prompt + 3], atol=FP32)


@every_case
@torch.no_grad()
def test_copied_cache_goes_on_twice_with_the_same_result(case):
    ids = token_ids(2, 8)
    model, full = model_and_logits(case, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    for each in (copy.deepcopy(cache), copy.deepcopy(cache), cache):
        close(model(ids[:, 5:], past_key_values=each).logits, full[:, 5:], atol=FP32)


@every_case
@torch.no_grad()
def test_cache_made_without_a_configuration(case):
    ids = token_ids(2, 7)
    model, full = model_and_logits(case, ids)
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split(3, dim=1)]
    close(torch.cat(parts, 1), full, atol=FP32)


@every_case
@torch.no_grad()
def test_sequences_of_a_cache_are_repeated_and_selected(case):
    ids = token_ids(3, 8)
    model, full = model_and_logits(case, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    close(model(ids[rows, 5:], past_key_values=cache).logits, full[rows, 5:], atol=FP32)


@every_case
@torch.no_grad()
def test_cache_that_records_is_cropped(case):
    """What speculative decoding does: write several tokens, take some back, go on."""
    ids = token_ids(1, 9)
    model, full = model_and_logits(case, ids)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :4], past_key_values=cache)
    cache.crop(0)
    wrong = (ids[:, 4:7] + 1) % 61
    model(wrong, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 4
    close(model(ids[:, 4:], past_key_values=cache).logits, full[:, 4:], atol=FP32)


@pytest.mark.parametrize("case", VARIANTS)
@torch.no_grad()
def test_speculative_decoding_says_the_same(case):
    """By prompt lookup, and with an assistant: a model's own kind, another, and itself as one."""
    model = shaken(tiny_model(case), 0.1)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assistants = [shaken(tiny_model(case), 0.12), shaken(tiny_model("additive"), 0.1)]
    for length in (1, 3, 8):
        ids = token_ids(1, length)
        options["attention_mask"] = torch.ones_like(ids)  # a 0 among them is text
        expected = model.generate(ids, use_cache=False, **options)
        looked_up = model.generate(ids, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(looked_up, expected)
        for assistant in assistants:
            said = model.generate(ids, assistant_model=assistant, **options)
            assert torch.equal(said, expected)


def test_cache_that_keeps_no_history_is_refused():
    model = tiny_model("ddl-cc")
    cache = DynamicCache()
    tiny_model("additive")(token_ids(1, 3), past_key_values=cache)
    one_line_error(lambda: model(token_ids(1, 3), past_key_values=cache), "DynamicLayer", "config=")


@pytest.mark.parametrize("case", ["ddl-cc", "ddl-tc", "additive-ec"])
def test_continuous_batching_is_refused_where_there_are_convolutions(case):
    one_line_error(lambda: tiny_model(case).generate_batch([[1, 2, 3]]), "convolutions", "generate")
