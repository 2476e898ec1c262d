"""The published model, written again as naively as possible, and random weights for it.

Our own code from facts: the paper's §2, §3 and appendix A, and the table of differences between
paper and published code. One sequence at a time, loops instead of tensor tricks, fp64 throughout.
It shares nothing with deep_delta, so that agreement of the two means something.
"""

import math
from typing import Any

import torch
from helpers import normal
from torch import Tensor

Weights = dict[str, Tensor]
EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x: Tensor, position: int) -> Tensor:
    """RoPE of one head (D,): the first half is paired with the second."""
    half = x.numel() // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position / 10000 ** (i / half)
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(c: Tensor, w: Weights, heads: int) -> Tensor:
    """Causal attention over c (T, d); queries and keys are rotated first, then normalised."""
    tokens = c.shape[0]
    q, k, v = (
        (c @ w[f"attn.{name}.weight"].T).view(tokens, heads, -1) for name in ("c_q", "c_k", "c_v")
    )
    out = torch.zeros_like(v)
    for head in range(heads):
        queries = [rms_norm(rotate(q[t, head], t), w["attn.q_rms.weight"]) for t in range(tokens)]
        keys = [rms_norm(rotate(k[t, head], t), w["attn.k_rms.weight"]) for t in range(tokens)]
        for t in range(tokens):
            scores = torch.stack([queries[t] @ key for key in keys[: t + 1]])
            out[t, head] = (scores / math.sqrt(q.shape[-1])).softmax(0) @ v[: t + 1, head]
    return out.flatten(1) @ w["attn.c_proj.weight"].T


def mlp(c: Tensor, w: Weights) -> Tensor:
    a, b = c @ w["mlp.c_fc1.weight"].T, c @ w["mlp.c_fc2.weight"].T
    return (a * torch.sigmoid(a) * b) @ w["mlp.c_proj.weight"].T


def over_tokens(x: Tensor, kernel: Tensor) -> Tensor:
    """A depthwise causal convolution of x (T, n) with kernel (n, K); last tap the current token."""
    out, taps = torch.zeros_like(x), kernel.shape[1]
    for t in range(x.shape[0]):
        for tap in range(taps):
            source = t - (taps - 1) + tap
            if source >= 0:
                out[t] += kernel[:, tap] * x[source]
    return out


def over_channels(x: Tensor, kernel: Tensor, causal: bool) -> Tensor:
    """A convolution of x (T, d, d_v) along d_v with kernel (d, K), zero padded to length d_v."""
    out, taps, channels = torch.zeros_like(x), kernel.shape[1], x.shape[2]
    left = taps - 1 if causal else (taps - 1) // 2
    for j in range(channels):
        for tap in range(taps):
            source = j - left + tap
            if 0 <= source < channels:
                out[:, :, j] += kernel[:, tap] * x[:, :, source]
    return out


def compress(x: Tensor, w: Weights, config: dict[str, Any]) -> Tensor:
    """x_in (T, d) of a state (T, d, d_v), by whichever compressor the weights hold."""
    if "shortconv.weight" in w:
        mixed = over_tokens(x.flatten(1), w["shortconv.weight"]).view_as(x)
    elif "weight" in w:
        mixed = over_channels(x, w["weight"], config.get("ddl_state_dv_shortconv_causal", False))
    else:
        return x[..., 0]
    return sum(w["read"][j] * mixed[:, :, j] for j in range(x.shape[2]))


def gate(c: Tensor, w: Weights) -> Tensor:
    if "beta_in.weight" in w:
        logits = torch.tanh(c @ w["beta_in.weight"].T) @ w["beta_out.weight"].T + w["beta_out.bias"]
    else:
        logits = c @ w["beta.weight"].T + w["beta.bias"]
    return 2 * torch.sigmoid(logits[:, 0])


def target(x_in: Tensor, w: Weights, config: dict[str, Any]) -> Tensor:
    kind = "v" if "ddl_value_channels" in config else "v_dim1"
    value = x_in @ w["v_proj.weight"].T + w["v_proj.bias"]
    if config[f"ddl_{kind}_constant"]:
        return torch.full_like(value, config[f"ddl_{kind}_constant_value"])
    if config["ddl_v_sigmoid"]:
        return config["ddl_v_sigmoid_scale"] * torch.sigmoid(value)
    return value


def rewrite(x: Tensor, h: Tensor, beta: Tensor, v: Tensor, eps: float) -> Tensor:
    out = x.clone()
    for t in range(x.shape[0]):
        k = h[t] / (h[t] @ h[t] + eps**2).sqrt()
        for j in range(x.shape[2]):
            out[t, :, j] += beta[t] * (v[t, j] - k @ x[t, :, j]) * k
    return out


def below(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def published_logits(weights: Weights, config: dict[str, Any], ids: Tensor) -> Tensor:
    """The logits (B, T, vocabulary) of the published model, in fp64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    return torch.stack([_sequence(weights, config, row) for row in ids])


def _sequence(weights: Weights, config: dict[str, Any], ids: Tensor) -> Tensor:
    table = weights["transformer.wte.weight"]
    embedded, channels = table[ids], config.get("ddl_value_channels", 1)
    x = embedded.unsqueeze(-1).repeat(1, 1, channels)
    if "input_embed.conv.weight" in weights:
        repeated = embedded.repeat_interleave(channels, 1)  # (feature, channel), channel last
        x = over_tokens(repeated, weights["input_embed.conv.weight"][:, 0]).view_as(x)
    for layer in range(config["num_hidden_layers"]):
        w = below(weights, f"transformer.h.{layer}.")
        for norm, delta, sublayer in (
            ("ln_1", "ddl_attn.", lambda c, w=w: attention(c, w, config["num_attention_heads"])),
            ("ln_2", "ddl_mlp.", lambda c, w=w: mlp(c, w)),
        ):
            x_in = compress(x, below(w, "compress."), config)
            c = rms_norm(x_in, w[f"{norm}.weight"])
            h, generators = sublayer(c), below(w, delta)
            if generators:
                beta, v = gate(c, generators), target(x_in, generators, config)
                x = rewrite(x, h, beta, v, config["ddl_k_eps"])
            else:
                x = x + h.unsqueeze(-1)
    read = compress(x, below(weights, "readout."), config)
    logits = rms_norm(read, weights["ln_f.weight"]) @ table.T
    return logits * config["hidden_size_base"] / table.shape[1] if config.get("mup") else logits


def random_published(
    variant: str,
    channels: int = 3,
    kernel: int = 3,
    ec_kernel: int = 3,
    gate_hidden: int | None = None,
    **options,
) -> tuple[Weights, dict[str, Any]]:
    """Random weights under the published names, and their configuration.

    variant: baseline, vdim1, CC, CC-EC, TC or TC-EC. Nothing is at a neutral start: norms differ
    from 1, biases from 0, kernels from averages.
    """
    width, heads, head_dim, inner, layers, vocab = 24, 2, 8, 20, 2, 31
    config: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "head_dim": head_dim, "block_size": 16, "variant": variant,
        "ddl_k_eps": 1e-5, "ddl_beta_single_linear": gate_hidden is None,
        "ddl_v_sigmoid": True, "ddl_v_sigmoid_scale": 4.0,
    }  # fmt: skip
    expanded = variant not in ("baseline", "vdim1")
    kind = "v" if expanded else "v_dim1"
    config |= {f"ddl_{kind}_constant": False, f"ddl_{kind}_constant_value": 2.0}
    if expanded:
        config |= {"ddl_value_channels": channels, "ddl_state_shortconv_kernel_size": kernel}
    else:
        channels = 1
    config |= options

    matrices = {"transformer.wte.weight": (vocab, width)}
    vectors = {"ln_f.weight": (1.0, width)}  # (mean, size)
    compressors = ["readout."]
    for layer in range(layers):
        h = f"transformer.h.{layer}."
        matrices |= {
            f"{h}attn.{n}.weight": (heads * head_dim, width) for n in ("c_q", "c_k", "c_v")
        }
        matrices |= {f"{h}mlp.{n}.weight": (inner, width) for n in ("c_fc1", "c_fc2")}
        matrices |= {f"{h}attn.c_proj.weight": (width, heads * head_dim)}
        matrices |= {f"{h}mlp.c_proj.weight": (width, inner)}
        vectors |= {f"{h}{n}.weight": (1.0, width) for n in ("ln_1", "ln_2")}
        vectors |= {f"{h}attn.{n}.weight": (1.0, head_dim) for n in ("q_rms", "k_rms")}
        compressors.append(f"{h}compress.")
        for part in [] if variant == "baseline" else [f"{h}ddl_attn.", f"{h}ddl_mlp."]:
            matrices[f"{part}v_proj.weight"] = (channels, width)
            vectors[f"{part}v_proj.bias"] = (0.0, channels)
            last, size = ("beta", width) if gate_hidden is None else ("beta_out", gate_hidden)
            matrices[f"{part}{last}.weight"] = (1, size)
            vectors[f"{part}{last}.bias"] = (0.0, 1)
            if gate_hidden is not None:
                matrices[f"{part}beta_in.weight"] = (gate_hidden, width)
    for prefix in compressors if expanded else []:
        name, rows = (
            ("shortconv.weight", width * channels) if "TC" in variant else ("weight", width)
        )
        matrices[prefix + name] = (rows, kernel)
        vectors[prefix + "read"] = (1 / channels, channels)
    if variant.endswith("EC"):
        matrices["input_embed.conv.weight"] = (width * channels, 1, ec_kernel)
    weights = {}
    for seed, (name, shape) in enumerate(sorted(matrices.items())):
        weights[name] = normal(*shape, seed=seed).float() / math.sqrt(shape[-1])
    for seed, (name, (mean, size)) in enumerate(sorted(vectors.items())):
        weights[name] = (mean + 0.3 * normal(size, seed=1000 + seed)).float()
    return weights, config
