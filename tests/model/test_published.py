"""`load_published` computes what the published code computes, and says clearly when it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, close, normal, one_line_error, token_ids
from published_reference import over_channels, published_logits, random_published
from safetensors.torch import load_file, safe_open, save_file
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from deep_delta import load_published
from deep_delta.residual import fold_channel_kernel

# fp32 against the fp64 reference: measured errors are below 1e-5, the contract asks for 1e-4.
LOGITS = 3e-5

CASES: dict[str, dict[str, Any]] = {
    "baseline": {"variant": "baseline"},
    "vdim1": {"variant": "vdim1"},
    "vdim1, linear value": {"variant": "vdim1", "ddl_v_sigmoid": False},
    "vdim1, constant value": {
        "variant": "vdim1",
        "ddl_v_dim1_constant": True,
        "ddl_v_dim1_constant_value": 1.5,
    },
    "vdim1, two-layer gate": {"variant": "vdim1", "gate_hidden": 7},
    "vdim1, large epsilon": {"variant": "vdim1", "ddl_k_eps": 0.5},
    "vdim1, µP": {"variant": "vdim1", "mup": True, "hidden_size_base": 12},
    "CC": {"variant": "CC"},
    "CC, d_v 2": {"variant": "CC", "channels": 2, "kernel": 2},
    "CC, d_v 4, kernel 4": {"variant": "CC", "channels": 4, "kernel": 4},
    "CC, kernel of 1": {"variant": "CC", "kernel": 1},
    "CC, kernel of 2": {"variant": "CC", "kernel": 2},
    "CC, kernel longer than d_v": {"variant": "CC", "channels": 2, "kernel": 5},
    "CC, causal": {"variant": "CC", "ddl_state_dv_shortconv_causal": True},
    "CC, causal, kernel of 4": {
        "variant": "CC",
        "kernel": 4,
        "ddl_state_dv_shortconv_causal": True,
    },
    "CC-EC": {"variant": "CC-EC"},
    "CC-EC, two-layer gate": {"variant": "CC-EC", "gate_hidden": 7, "ec_kernel": 4},
    "CC-EC, linear value": {"variant": "CC-EC", "ddl_v_sigmoid": False},
    "CC-EC, constant value": {"variant": "CC-EC", "ddl_v_constant": True},
    "CC-EC, sigmoid of scale 2": {"variant": "CC-EC", "ddl_v_sigmoid_scale": 2.0},
    "TC": {"variant": "TC"},
    "TC, d_v 2, kernel 4": {"variant": "TC", "channels": 2, "kernel": 4},
    "TC, kernel of 1": {"variant": "TC", "kernel": 1},
    "TC-EC": {"variant": "TC-EC", "kernel": 4, "ec_kernel": 2},
    "TC-EC, linear value": {"variant": "TC-EC", "channels": 2, "ddl_v_sigmoid": False},
    "TC-EC, constant value": {"variant": "TC-EC", "channels": 4, "ddl_v_constant": True},
    "TC-EC, two-layer gate": {"variant": "TC-EC", "gate_hidden": 5},
}

PARITY_FILES = sorted(PARITY.glob("*.safetensors"))
parity = pytest.mark.parametrize(
    "file",
    PARITY_FILES
    or [pytest.param(None, marks=pytest.mark.skip(reason="no ../shared/parity on this machine"))],
    ids=lambda file: file.stem if file else "absent",
)


def read_parity(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    return load_file(file), config


@pytest.mark.parametrize("case", CASES)
def test_every_published_option(case):
    weights, config = random_published(**CASES[case])
    ids = token_ids(2, 9, vocab_size=31)
    model = load_published(weights, config)
    assert not model.training
    with torch.no_grad():
        logits = model(ids).logits
    expected = published_logits(weights, config, ids)
    assert expected.std() > 0.1  # a model that says something
    close(logits.double(), expected, atol=LOGITS)


@parity
def test_reference_agrees_with_the_authors_own_numbers(file):
    """The naive reference is worth comparing with: it reproduces the published code."""
    tensors, config = read_parity(file)
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if "weights." in n}
    logits = published_logits(weights, config, tensors["input_ids"][:1, :12])
    close(logits, tensors["logits"][:1, :12].double(), atol=1e-5)  # fp32 there, fp64 here


@parity
def test_authors_logits_loss_and_gradients(file):
    """1e-4 absolute for logits and 1e-3 relative for every gradient, as the contract asks."""
    tensors, config = read_parity(file)
    model = load_published(file)
    out = model(tensors["input_ids"], shift_labels=tensors["next_ids"])
    close(out.logits, tensors["logits"], atol=1e-4)
    close(out.loss, tensors["loss"][0], atol=1e-5)
    out.loss.backward()
    ours = dict(model.named_parameters())
    for name, (pulled, source) in published_gradients(tensors, config, ours).items():
        error = (pulled - source).norm() / source.norm().clamp_min(1e-12)
        assert error < 1e-3, name


def published_gradients(tensors, config, ours) -> dict:
    """name -> (our gradient in the published parameters' terms, theirs), for every `grads.*`.

    A folded channel kernel is a function of the published kernel and read vector: the chain rule
    takes our gradient back to both.
    """
    parts = {
        "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
        "attn.q_rms": "self_attn.q_norm", "attn.k_rms": "self_attn.k_norm",
        "mlp.c_fc1": "mlp.gate_proj", "mlp.c_fc2": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
        "ln_1": "attn_residual.norm", "ln_2": "mlp_residual.norm",
        "ddl_attn.beta": "attn_residual.gate", "ddl_mlp.beta": "mlp_residual.gate",
        "ddl_attn.v_proj": "attn_residual.value", "ddl_mlp.v_proj": "mlp_residual.value",
        "compress": "attn_residual.compressor", "compress.shortconv": "attn_residual.compressor",
    }  # fmt: skip
    top = {
        "transformer.wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight",
        "input_embed.conv.weight": "model.expand.weight",
        "readout.weight": "model.readout.compressor.weight",
        "readout.shortconv.weight": "model.readout.compressor.weight",
        "readout.read": "model.readout.compressor.read",
    }  # fmt: skip
    found: dict[str, tuple] = {}
    for key in [key for key in tensors if key.startswith("grads.")]:
        name, theirs = key.removeprefix("grads."), tensors[key]
        if name in top:
            target = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            part, _, leaf = rest.rpartition(".")
            target = f"model.layers.{layer}.{parts[part]}.{leaf}"
        if "compress" in name or "readout" in name:
            prefix = name.rpartition(".")[0].removesuffix(".shortconv") + "."
            if f"weights.{prefix}weight" in tensors:  # a kernel over channels: folded here
                leaves = [
                    tensors[f"weights.{prefix}{n}"].clone().requires_grad_()
                    for n in ("weight", "read")
                ]
                folded = fold_channel_kernel(*leaves, config["ddl_state_dv_shortconv_causal"])
                gradient = ours[target.rpartition(".")[0] + ".weight"].grad
                pulled = torch.autograd.grad(folded, leaves, gradient)
                found[name] = (pulled[name.endswith("read")], theirs)
                continue
        found[name] = (ours[target].grad.reshape(theirs.shape), theirs)
    assert len(found) == len([key for key in tensors if key.startswith("weights.")])
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_folded_kernel_is_the_convolution_and_the_read(channels, taps, causal):
    kernel, read, x = normal(5, taps), normal(channels, seed=1), normal(7, 5, channels, seed=2)
    folded = fold_channel_kernel(kernel, read, causal)
    pooled = over_channels(x, kernel, causal) @ read
    close((x * folded).sum(-1), pooled, atol=1e-12)
    if not causal and taps % 2:  # torch's own "same" padding, which warns for even kernels
        same = F.conv1d(x, kernel.unsqueeze(1), padding="same", groups=5) @ read
        close(same, pooled, atol=1e-12)


@pytest.mark.parametrize("form", ["safetensors folder", "bin folder", "file", "compiled names"])
def test_every_form_of_checkpoint(tmp_path, form):
    weights, config = random_published("CC-EC")
    (tmp_path / "config.json").write_text(json.dumps(config))
    source: Any = tmp_path
    if form == "safetensors folder":
        save_file(weights, tmp_path / "model.safetensors")
    elif form == "bin folder":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    elif form == "file":
        source = tmp_path / "one.safetensors"
        named = {f"weights.{name}": tensor for name, tensor in weights.items()}
        save_file({**named, "logits": torch.ones(1)}, source, {"config": json.dumps(config)})
    else:
        torch.save(
            {f"_orig_mod.{n}": t for n, t in weights.items()}, tmp_path / "pytorch_model.bin"
        )
    ids = token_ids(1, 5, vocab_size=31)
    with torch.no_grad():
        expected = load_published(weights, config)(ids).logits
        close(load_published(source)(ids).logits, expected, atol=1e-5)
        close(load_published(str(source))(ids).logits, expected, atol=1e-5)


def test_overrides_are_applied_on_top():
    weights, config = random_published("CC")
    model = load_published(weights, config, state_dtype="bfloat16", rms_norm_eps=1e-6)
    assert model.config.state_dtype == "bfloat16"
    assert model.config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_k_shift", True), ("using_groupnorm", True), ("rope_ratio", 0.5), ("bias", True),
        ("ddl_sequence_reduction_version", 2), ("attention_dtype", "bfloat16"),
        ("rms_norm_eps", 1e-6), ("parameterization", "muP"), ("tie_word_embeddings", False),
        ("an_option_of_tomorrow", False), ("ddl_v_sigmoid_scal", 2.0), ("erase", False),
    ],
)  # fmt: skip
def test_option_of_another_model_or_unknown_is_refused(option, value):
    weights, config = random_published("vdim1")
    one_line_error(lambda: load_published(weights, {**config, option: value}), option)


@pytest.mark.parametrize(
    "options",
    [
        {"ddl_sequence_reduction_version": 1, "attention_dtype": "auto"},
        {"attention_dtype": "float32", "residual_branch_mult": 1.0, "rope_base": 10000},
        {"dropout": 0.0, "embedding_init_std": 0.02, "kv_cache_slot_size": 128},
        PreTrainedConfig(architectures=["GPT"], dtype="float32").to_dict(),
        {"_name_or_path": "x", "torch_dtype": "float32", "use_cache": True, "is_decoder": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_option_that_leaves_the_function_alone_is_taken(options):
    weights, config = random_published("CC-EC")
    ids = token_ids(1, 5, vocab_size=31)
    with torch.no_grad():
        expected = load_published(weights, config)(ids).logits
        close(load_published(weights, {**config, **options})(ids).logits, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["widthmuP", "completeP", "spectralP"])
def test_width_scaling_by_its_newer_name(name):
    weights, config = random_published("vdim1")
    config["hidden_size_base"] = 12
    ids = token_ids(1, 5, vocab_size=31)
    new = load_published(weights, {**config, "parameterization": name})(ids).logits
    close(new, load_published(weights, {**config, "mup": True})(ids).logits, atol=0)
    other_depth = {**config, "parameterization": name, "num_hidden_layers_base": 4}
    if name == "widthmuP":
        close(load_published(weights, other_depth)(ids).logits, new, atol=0)
    else:  # it divides every update by the depth
        one_line_error(lambda: load_published(weights, other_depth), "num_hidden_layers_base=4")


def test_sigmoid_without_its_scale_is_two_models():
    weights, config = random_published("vdim1")
    del config["ddl_v_sigmoid_scale"]
    one_line_error(lambda: load_published(weights, config), "ddl_v_sigmoid_scale", "1.0", "4.0")
    load_published(weights, {**config, "ddl_v_sigmoid": False})


def test_head_of_its_own_is_refused():
    weights, config = random_published("vdim1")
    table = weights["transformer.wte.weight"]
    load_published({**weights, "lm_head.weight": table.clone()}, config)
    untied = {**weights, "lm_head.weight": table + 1}
    one_line_error(lambda: load_published(untied, config), "lm_head.weight")


@pytest.mark.parametrize("case", CASES)
def test_weights_in_fp64_pass_through_no_other_precision(case, monkeypatch):
    """To 1e-12, but for two steps of transformers' attention, which are fp32 by design."""

    def norm(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight

    def angles(self, x, position_ids):
        half = self.inv_freq.numel()
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        both = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return both.cos(), both.sin()

    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm)
    monkeypatch.setattr(Qwen3RotaryEmbedding, "forward", angles)
    weights, config = random_published(**CASES[case])
    weights = {name: t.double() * (1 + 1e-9) for name, t in weights.items()}  # no fp32 numbers
    ids = token_ids(2, 9, vocab_size=31)
    with torch.no_grad():
        logits = load_published(weights, config)(ids).logits
    assert logits.dtype == torch.float64
    close(logits, published_logits(weights, config, ids), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_has_the_weights_dtype_and_exact_frequencies(dtype):
    weights, config = random_published("CC-EC")
    model = load_published({name: t.to(dtype) for name, t in weights.items()}, config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = load_published(weights, config).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_weights_that_do_not_fit_are_refused():
    weights, config = random_published("CC-EC")

    def load(**changes):
        changed = {**weights, **{name.replace("__", "."): t for name, t in changes.items()}}
        return load_published({n: t for n, t in changed.items() if t is not None}, config)

    one_line_error(lambda: load(transformer__h__0__attn__extra__weight=torch.ones(1)), "extra")
    one_line_error(lambda: load(transformer__surprise=torch.ones(1)), "surprise")
    one_line_error(lambda: load(transformer__wte__weight=None), "wte")
    one_line_error(lambda: load(readout__read=None), "readout")
    one_line_error(lambda: load(transformer__h__1__ln_2__weight=None), "norm")
    one_line_error(lambda: load(transformer__h__1__ln_2__weight=torch.ones(3)), "size mismatch")
    one_line_error(lambda: load_published(weights), "config")
    one_line_error(lambda: load_published({"lm.weight": torch.ones(2, 2)}, config), "published")


def test_files_that_are_not_a_checkpoint_are_refused(tmp_path):
    one_line_error(lambda: load_published(tmp_path / "nowhere"), "nowhere")
    one_line_error(lambda: load_published(tmp_path), "config.json")
    (tmp_path / "config.json").write_text(json.dumps(random_published("vdim1")[1]))
    one_line_error(lambda: load_published(tmp_path), "model.safetensors")


@pytest.mark.parametrize(
    "broken", ["config.json", "model.safetensors", "pytorch_model.bin", "one.safetensors"]
)
def test_broken_file_is_named_in_one_line(tmp_path, broken):
    (tmp_path / "config.json").write_text(json.dumps(random_published("vdim1")[1]))
    if broken == "config.json":
        save_file(random_published("vdim1")[0], tmp_path / "model.safetensors")
    (tmp_path / broken).write_bytes(b"{ neither JSON nor tensors")
    source = tmp_path / broken if broken == "one.safetensors" else tmp_path
    one_line_error(lambda: load_published(source), broken)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"transformer.wte.weight": torch.ones(5, 4)},
        {"transformer.wte.weight": torch.ones(5, 4), "transformer.h.x.ln_1.weight": torch.ones(4)},
        {"transformer.wte.weight": torch.ones(5, 4), "transformer.h.0.ln_1.weight": torch.ones(4)},
    ],
    ids=["nothing", "embeddings", "no number", "no attention"],
)
def test_incomplete_weights_are_one_line(weights):
    one_line_error(lambda: load_published(weights, {"num_attention_heads": 2}), "published")
