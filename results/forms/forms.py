#!/usr/bin/env python3
"""Forms that the library does not have yet: a small decoder in plain torch whose residual, baseline and optimizer are options.

    DAT=folder-with-token-files  CUDA_VISIBLE_DEVICES=0  python3 forms.py --out rows.jsonl --seconds 560 SPEC SPEC ...

SPEC = NAME[+option=value...]@LEARNING_RATE[#SEED], for instance  mended+erase=read@8e-3#1  or  additive+bnorm=0.1+scales=1+ve=1@8e-3
NAME is a row of NAMES below; the options are those of DEFAULTS, where each is described. Schedule: WARM steps up, cosine to a tenth; clip 1.0;
bf16 autocast; environment SHAPE, STEPS, BS. A line of JSON a training; `inside` are figures of each sublayer's write at the end, `inside_during` before step 1 and at quarters. No fused kernels: the
seconds say nothing about a form's cost. --check compares gradients and parts with slow formulas on a CPU and trains nothing.
A throw-away instrument for leads; what wins becomes an option of the library and is confirmed there, on fresh seeds and unread text.
"""
import argparse, faulthandler, gc, json, lzma, math, os, time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEFAULTS = dict(
    residual="delta",   # or additive: X + F(x_in) on every channel
    dv=4,               # channels of the state
    ec=1,               # embedding convolution over 4 tokens, each channel its own; 0: every channel is the embedding
    eps=1e-5,           # of the norm behind a read
    noise=0.0,          # its current tap (without ec: a learned scale a feature and channel) starts as 1 + N(0, noise²)
    enorm=0,            # 1: embeddings are RMS-normalised before they enter the state (their scale is then not the tied head's)
    initializer_range=0.02,  # embeddings' standard deviation
    cinit="mean",       # the read (readout too) starts as the channels' mean; folded: the library's published start (a kernel over the channels, folded: small, random, alike over channels); published: the same size, each channel its own (so in rows-3.jsonl); random: 25 times that; small: c0 of the mean
    c0=0.04,
    rgain=0,            # 1: a read for d_v = 1 too, a learned gain for each feature before the norm (starts as cinit says)
    share=1,            # one read for both sublayers of a block
    dynread=0,          # 1: x_in = sum_j (C_ij + 0.01 r_j) X_ij, r = tanh(W_r norm(C X)), W_r from 0
    vread=0,            # 1: attention's values have a read (from a copy of the block's) and a norm of their own
    x0read=0,           # 1, additive: sublayers read x + r(t) x0, r a token's number, from 0
    vx0=0,              # 1, additive: attention's values read norm(x + mu * x0), mu a feature's number, from 0
    target="signed",    # signed: S (2 sigmoid(2 slope z / S) - 1); sigmoid: S sigmoid(z); linear: z; const: a learned vector around 2
    scale=8.0, slope=4.0,  # S; slope of the signed target at 0 (4 = 8 (2 sigmoid(z) - 1); the sigmoid's is S / 4)
    zscale=1.0,         # factor on W x in z = zscale W x + b (slope scales b as well); 0: the target depends on no token
    v0=0,               # 1: the target's weights start at 0, so that nothing is written at first (what output projections at 0 are to additive)
    source="state",     # the target reads x_in as it is, or the normalised context
    gate="token",       # beta = 2 sigmoid(w c + b) from 1; or layer (b alone), or fixed (1)
    betach=0,           # 1: a beta for each channel
    kgain=0,            # 1: a learned gain for each feature on k before normalisation
    erase="none",       # shared (beta), apart (a gate of its own along k), read (along e = normalise(g x_in)), random (a fixed e a sublayer)
    e0=0.1,             # where that gate starts
    decay=0,            # 1: X <- a X before the write, a = sigmoid(w c + b) a channel, from 0.98
    tgate=0,            # 1, additive: the write times 2 sigmoid(w c + b), a token's number, from 1
    bnorm=0.0,          # g0 > 0: additive writes g * RMSNorm(F), g learned for each feature from g0
    scales=0,           # 1: X <- lambda X + mu X0 before each block, lambda from 1, mu from 0.1, learned
    zero=0,             # 1: output projections start at 0 (additive without bnorm only: a direction needs a length)
    agate=0,            # 1: attention's output times 2 sigmoid(W c) for each head, W from 0
    ve=0,               # 1: gated value embeddings on every other layer, the last included (more parameters)
    qk="after",         # QK-norm after or before RoPE
    muon=1,             # 0: AdamW for everything
    femb=1.0, fres=1.0, fval=1.0,  # factors on the rate: embeddings (and tied head, value embeddings); the residual's own tensors; of these W and b of the target
    wd=0.1, rdecay=1,   # weight decay; rdecay=0: none on the residual's own tensors
)
NAMES = dict(
    additive=dict(residual="additive", dv=1, ec=0),
    expanded=dict(residual="additive", bnorm=0.1),
    constant=dict(target="const", gate="layer"),
    published=dict(target="sigmoid", scale=4.0, erase="shared", cinit="published"),
    writeonly=dict(noise=0.5),                              # the mended form's twin
    mended=dict(noise=0.5, erase="apart"),
)
p = argparse.ArgumentParser(); p.add_argument("--out"); p.add_argument("--seconds", type=float, default=560); p.add_argument("--hang", type=float, default=420); p.add_argument("--check", action="store_true"); p.add_argument("specs", nargs="*"); a = p.parse_args()
T0, LENGTH, VAL, WARM, VOCABULARY = time.time(), 1024, int(os.environ.get("VAL", 960)), int(os.environ.get("WARM", 100)), int(os.environ.get("VOCABULARY", 50304))
BATCH, STEPS = int(os.environ.get("BS", 32)), int(os.environ.get("STEPS", 1450))
WIDTH, DEPTH, HEADS = map(int, os.environ.get("SHAPE", "512,8,4").split(","))
HEAD = 128 if WIDTH >= 512 else WIDTH // HEADS
torch.set_float32_matmul_precision("high"); torch._dynamo.config.recompile_limit = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu": torch.cuda.synchronize = lambda: None


def start_of_read(o, channels):
    """(c, d)"""
    if o.cinit == "folded":
        kernel, start, left = torch.randn(channels, WIDTH) * 0.5 / math.sqrt(WIDTH), torch.zeros(channels, WIDTH), (channels - 1) // 2
        for output in range(channels):
            for tap in range(channels):
                if 0 <= output + tap - left < channels: start[output + tap - left] += kernel[tap] / channels
        return start
    if o.cinit in ("published", "random"): return torch.randn(channels, WIDTH) * (25 if o.cinit == "random" else 1) * 0.5 / math.sqrt(WIDTH) * math.sqrt(3) / max(channels, 4)
    return torch.full((channels, WIDTH), (o.c0 if o.cinit == "small" else 1) / channels)


def rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)


PROBE = None  # a list while `inside` looks


def figures(x, write, v=None, beta=None, product=None):
    """Length of the write over the state's; mean |v|; how much v, beta and beta v vary over tokens (standard deviation over RMS, 0 to 1); share of tokens with the rarer sign."""
    varies = lambda y: float((y.std((0, 1), correction=0) / y.square().mean((0, 1)).sqrt().clamp_min(1e-9)).mean())
    found = dict(length=float((write.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-9)).mean()))
    if v is not None:
        positive = (v > 0).float().mean((0, 1))
        found |= dict(v=float(v.abs().mean()), v_varies=varies(v), product_varies=varies(product), rarer_sign=float(torch.minimum(positive, 1 - positive).mean()))
        if torch.is_tensor(beta) and beta.ndim > 2: found |= dict(beta=float(beta.mean()), beta_varies=varies(beta))
    return {k: round(y, 5) for k, y in found.items()}


class Own(nn.Module):
    """Marks the residual's own tensors, for their rate and decay."""


class Residual(Own):
    """One sublayer's read and write. X is (B, T, C, d)."""

    def __init__(self, o, lender=None):
        super().__init__()
        d, c = WIDTH, o.dv
        self.o, self.norm = o, nn.Parameter(torch.ones(d))
        if c > 1 or o.rgain:
            if lender is None: self.own_read = nn.Parameter(start_of_read(o, c))
            else: object.__setattr__(self, "own_read", lender.own_read)
        if o.dynread: self.dyn = nn.Parameter(torch.zeros(c, d))
        if o.x0read: self.r0 = nn.Parameter(torch.zeros(1, d))
        if o.residual == "additive":
            if o.tgate: self.beta, self.beta_bias = nn.Parameter(torch.randn(1, d) * 0.5 / math.sqrt(d)), nn.Parameter(torch.zeros(1))
            if o.bnorm: self.gain = nn.Parameter(torch.full((d,), o.bnorm))
            if c > 1: self.spread = nn.Parameter(1 + torch.linspace(-0.1, 0.1, c))
            return
        channels, small = (c if o.betach else 1), lambda *shape: nn.Parameter(torch.randn(*shape) * 0.5 / math.sqrt(d))
        if o.target == "const": self.vector = nn.Parameter(2 + torch.linspace(-0.1, 0.1, c))
        else: self.value, self.value_bias = (nn.Parameter(torch.zeros(c, d)) if o.v0 else small(c, d)), nn.Parameter((torch.rand(c) * 2 - 1) / math.sqrt(d) if o.target == "sigmoid" else torch.zeros(c))
        if o.gate == "token": self.beta = small(channels, d)
        if o.gate != "fixed": self.beta_bias = nn.Parameter(torch.zeros(channels))
        if o.kgain: self.kgain = nn.Parameter(torch.ones(d))
        if o.erase in ("apart", "read", "random"):
            self.erase, self.erase_bias = small(1, d), nn.Parameter(torch.full((1,), math.log(o.e0 / 2) - math.log1p(-o.e0 / 2)))
        if o.erase == "read": self.egain = nn.Parameter(torch.ones(d))
        if o.erase == "random": self.register_buffer("e", F.normalize(torch.randn(d), dim=0))
        if o.decay: self.keep, self.keep_bias = nn.Parameter(torch.zeros(c, d)), nn.Parameter(torch.full((c,), math.log(0.98 / 0.02)))

    def read(self, x, x0):
        seen = (x * self.own_read).sum(2) if self.o.dv > 1 or self.o.rgain else x[:, :, 0]
        if self.o.dynread:
            r = torch.tanh(F.linear(rms(seen), self.dyn.float()))
            seen = seen + 0.01 * (r.unsqueeze(-1) * x).sum(2)
        if self.o.x0read: seen = seen + torch.tanh(F.linear(rms(seen), self.r0.float())) * x0[:, :, 0]
        return seen, rms(seen, self.norm, self.o.eps)

    def forward(self, x, x0, sublayer):
        o = self.o
        seen, context = self.read(x, x0)
        h = sublayer(context, x, x0).float()
        if o.residual == "additive":
            if o.bnorm: h = rms(h, self.gain, 1e-6)
            if o.tgate: h = h * 2 * torch.sigmoid(F.linear(context, self.beta, self.beta_bias))
            if PROBE is not None: PROBE.append(figures(x, h.unsqueeze(2)))
            return x + (h.unsqueeze(2) if o.dv == 1 else h.unsqueeze(2) * self.spread.view(-1, 1))
        with torch.autocast(DEVICE.type, enabled=False):
            if o.kgain: h = h * self.kgain
            k = h * torch.rsqrt(h.square().sum(-1, keepdim=True) + 1e-10)
            if o.target == "const": v = self.vector.expand(*h.shape[:-1], -1)
            else:
                z = o.zscale * F.linear(seen if o.source == "state" else context, self.value) + self.value_bias
                v = z if o.target == "linear" else o.scale * torch.sigmoid(z) if o.target == "sigmoid" else o.scale * (2 * torch.sigmoid(2 * o.slope / o.scale * z) - 1)
            beta = 2 * torch.sigmoid(F.linear(context, self.beta, self.beta_bias)) if o.gate == "token" else 2 * torch.sigmoid(self.beta_bias) if o.gate == "layer" else 1.0
            write = (beta * v).unsqueeze(-1) * k.unsqueeze(2)
            if PROBE is not None: PROBE.append(figures(x, write, v, beta, beta * v))
            if o.decay: write = write - (1 - torch.sigmoid(F.linear(context, self.keep, self.keep_bias))).unsqueeze(-1) * x
            if o.erase != "none":
                e = k if o.erase in ("shared", "apart") else self.e if o.erase == "random" else F.normalize(self.egain * seen, dim=-1, eps=1e-5)
                e = e.expand_as(k).unsqueeze(2)
                strength = beta if o.erase == "shared" else 2 * torch.sigmoid(F.linear(context, self.erase, self.erase_bias))
                if not isinstance(strength, float): strength = strength.unsqueeze(-1)
                write = write - strength * e * (e * x).sum(-1, keepdim=True)
            return x + write


class Attention(nn.Module):
    def __init__(self, o, layer):
        super().__init__()
        self.o, inner = o, HEADS * HEAD
        self.q, self.k, self.v = (nn.Linear(WIDTH, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, WIDTH, bias=False)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(HEAD)), nn.Parameter(torch.ones(HEAD))
        if o.agate: self.gate = nn.Parameter(torch.zeros(HEADS, WIDTH))
        self.ve_here = bool(o.ve) and layer % 2 == (DEPTH - 1) % 2
        if self.ve_here: self.ve_gate = nn.Parameter(torch.zeros(HEADS, WIDTH))
        frequency = 10000 ** -(torch.arange(0, HEAD, 2) / HEAD)
        angle = torch.outer(torch.arange(LENGTH), frequency)
        self.register_buffer("cos", angle.cos().repeat(1, 2)[None, None]); self.register_buffer("sin", angle.sin().repeat(1, 2)[None, None])

    def rope(self, x):
        half = x.chunk(2, -1); t = x.shape[2]
        return x * self.cos[:, :, :t] + torch.cat((-half[1], half[0]), -1) * self.sin[:, :, :t]

    def forward(self, context, values_from, ve):
        split = lambda x: x.view(*x.shape[:2], HEADS, HEAD).transpose(1, 2)
        q, k, v = split(self.q(context)), split(self.k(context)), split(self.v(values_from))
        if self.o.qk == "before": q, k = rms(q, self.q_norm), rms(k, self.k_norm)
        q, k = self.rope(q), self.rope(k)
        if self.o.qk == "after": q, k = rms(q, self.q_norm), rms(k, self.k_norm)
        if self.ve_here:
            v = v + (2 * torch.sigmoid(F.linear(context, self.ve_gate))).transpose(1, 2).unsqueeze(-1) * split(ve)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        if self.o.agate: y = y * (2 * torch.sigmoid(F.linear(context, self.gate))).transpose(1, 2).unsqueeze(-1).to(y.dtype)
        return self.out(y.transpose(1, 2).flatten(2))


class ValueRead(Own):
    def __init__(self, o, lender):
        super().__init__()
        self.o, self.norm = o, nn.Parameter(torch.ones(WIDTH))
        if o.vread: self.read = nn.Parameter(lender.own_read.detach().clone())
        else: self.mu = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x, x0):
        return rms((x * self.read).sum(2) if self.o.vread else x[:, :, 0] + self.mu * x0[:, :, 0], self.norm)


class Scales(Own):
    def __init__(self):
        super().__init__(); self.keep, self.first = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x, x0): return self.keep * x + self.first * x0


class Block(nn.Module):
    def __init__(self, o, layer):
        super().__init__()
        self.residual_a = Residual(o); self.attention = Attention(o, layer)
        self.residual_m = Residual(o, self.residual_a if o.share else None)
        inner = 8 * WIDTH // 3
        self.gate, self.up, self.down = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH, bias=False)
        self.values = ValueRead(o, self.residual_a) if o.vread or o.vx0 else None
        self.scales = Scales() if o.scales else None

    def forward(self, x, x0, ve):
        if self.scales is not None: x = self.scales(x, x0)
        attend = lambda c, x, x0: self.attention(c, c if self.values is None else self.values(x, x0), ve)
        x = self.residual_a(x, x0, attend)
        return self.residual_m(x, x0, lambda c, *_: self.down(F.silu(self.gate(c)) * self.up(c)))


class Expand(Own):
    def __init__(self, o):
        super().__init__()
        taps = torch.zeros(4, o.dv, WIDTH); taps[-1] = 1
        if o.noise: taps[-1] += torch.randn(o.dv, WIDTH) * o.noise
        self.o, self.taps = o, nn.Parameter(taps if o.ec else taps[-1:]) if o.ec or o.noise else None

    def forward(self, e):
        if self.o.enorm: e = rms(e)
        if self.taps is None: return e.unsqueeze(2).expand(-1, -1, self.o.dv, -1).contiguous()
        k = self.taps.shape[0]; padded = F.pad(e, (0, 0, k - 1, 0))
        return sum(padded[:, i : i + e.shape[1]].unsqueeze(2) * self.taps[i] for i in range(k))


class Readout(Own):
    def __init__(self, o):
        super().__init__()
        self.read = nn.Parameter(start_of_read(o, o.dv)) if o.dv > 1 or o.rgain else None
        self.norm, self.eps = nn.Parameter(torch.ones(WIDTH)), o.eps

    def forward(self, x): return rms(x[:, :, 0] if self.read is None else (x * self.read).sum(2), self.norm, self.eps)


class Model(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * o.initializer_range)
        self.expand, self.blocks, self.readout = Expand(o), nn.ModuleList(Block(o, i) for i in range(DEPTH)), Readout(o)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                out = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(WIDTH) / (math.sqrt(DEPTH) if out else 1))
                if out and o.zero: nn.init.zeros_(module.weight)
        self.ve = nn.ParameterList(nn.Parameter(torch.randn(VOCABULARY, HEADS * HEAD) / math.sqrt(WIDTH)) if b.attention.ve_here else None for b in self.blocks) if o.ve else None

    def state(self, tokens):
        x0 = x = self.expand(F.embedding(tokens, self.embed))
        for i, block in enumerate(self.blocks):
            x = block(x, x0, None if self.ve is None or not block.attention.ve_here else F.embedding(tokens, self.ve[i]))
        return x

    def forward(self, tokens): return loss_of(self.readout(self.state(tokens)), self.embed, tokens)


def loss_plain(hidden, weight, tokens):
    logits = F.linear(hidden, weight).float()
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


loss_of = torch.compile(loss_plain, fullgraph=True) if DEVICE.type == "cuda" else loss_plain


class Muon(torch.optim.Muon):
    """torch's Muon with all matrices of one shape orthogonalized in one batch: the same update, a tenth of the launches."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for q in group["params"]: shapes.setdefault(q.shape, []).append(q)
            for shape, same in shapes.items():
                grads, buffers = [q.grad for q in same], [self.state[q].setdefault("momentum_buffer", torch.zeros_like(q)) for q in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).bfloat16(); flip = shape[0] > shape[1]
                x = x.mT if flip else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"]); c1, c2, c3 = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    gram = x @ x.mT; x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=c2, alpha=c3), x, beta=c1)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list((x.mT if flip else x).float().unbind()), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def options_of(spec):
    name, _, rest = spec.partition("@"); lr, _, seed = rest.partition("#")
    name, *given = name.split("+")
    if name not in NAMES: raise SystemExit(f"no form {name!r}; there are {', '.join(NAMES)}")
    o = {**DEFAULTS, **NAMES[name]}
    for option in given:
        key, _, value = option.partition("=")
        if key not in DEFAULTS: raise SystemExit(f"no option {key!r}; there are {', '.join(DEFAULTS)}")
        o[key] = type(DEFAULTS[key])(float(value) if isinstance(DEFAULTS[key], int) else value)
    if o["zero"] and (o["residual"] == "delta" or o["bnorm"]): raise SystemExit("zero=1 is for additive without bnorm")
    return argparse.Namespace(**o), float(lr), int(seed or 0)


def optimizers_of(model, o, lr):
    own = {id(q) for m in model.modules() if isinstance(m, Own) for q in m.parameters()}
    tables = {id(model.embed)} | ({id(q) for q in model.ve if q is not None} if model.ve is not None else set())
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = {id(q) for q in matrices} if o.muon else set()
    targets, groups = {id(q) for n, q in model.named_parameters() if n.rpartition(".")[2] in ("value", "value_bias", "vector")}, {}
    for q in model.parameters():
        if id(q) in hidden: continue
        factor = o.femb if id(q) in tables else (o.fres if id(q) in own else 1.0) * (o.fval if id(q) in targets else 1.0)
        decays = q.ndim >= 2 and not (id(q) in own and not o.rdecay)
        groups.setdefault((factor, decays), []).append(q)
    found = [torch.optim.AdamW([dict(params=qs, lr=lr * f, base=lr * f, weight_decay=o.wd * d) for (f, d), qs in groups.items()], betas=(0.9, 0.95), fused=DEVICE.type == "cuda")]
    if o.muon: found.append(Muon([dict(params=matrices, lr=lr, base=lr)], lr=lr, weight_decay=o.wd, adjust_lr_fn="match_rms_adamw"))
    return found


def tokens(name):
    return torch.from_numpy(np.frombuffer(lzma.open(os.path.join(os.environ["DAT"], name)).read(), "<u2").astype(np.int32)).to(DEVICE)


def rows(data, index):
    return data[index[:, None] * LENGTH + torch.arange(LENGTH, device=DEVICE)].long()


def order(seed):
    g, found = torch.Generator().manual_seed(1000 + seed), []
    while len(found) < STEPS * BATCH: found += torch.randperm((len(train) - 1) // LENGTH, generator=g).tolist()
    return torch.tensor(found[: STEPS * BATCH]).view(STEPS, BATCH).to(DEVICE)


@torch.no_grad()
def evaluate(model):
    parts = []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for i in range(0, VAL, BATCH): parts.append(float(model(rows(val, torch.arange(i, i + BATCH, device=DEVICE)))))
    half = parts[: max(1, 480 // BATCH)]
    return sum(parts) / len(parts), sum(half) / len(half)


@torch.no_grad()
def inside(model, o, writes_only=False):
    """Mean entropy rank of X over its channels before the readout, and their mean cosine (in the batch and precision that are compiled already); and `figures` of each sublayer, not compiled."""
    global PROBE
    PROBE, tokens = [], rows(val, torch.arange(2, device=DEVICE))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        x0 = x = model.expand.forward(F.embedding(tokens, model.embed))
        for i, block in enumerate(model.blocks): x = block.forward(x, x0, None if model.ve is None or not block.attention.ve_here else F.embedding(tokens, model.ve[i]))
    found, PROBE = PROBE, None
    if writes_only: return found
    if o.dv == 1: return None, None, found
    with torch.autocast(DEVICE.type, torch.bfloat16): x = model.state(rows(val, torch.arange(BATCH, device=DEVICE)))[:4].double()
    s = torch.linalg.eigvalsh(x @ x.mT).clamp_min(0).sqrt(); share = s / s.sum(-1, keepdim=True); n = F.normalize(x, dim=-1); c = n @ n.mT
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum(-1)).mean()), float(c[..., ~torch.eye(o.dv, dtype=torch.bool, device=c.device)].mean()), found


def run(spec):
    torch._dynamo.reset(); gc.collect(); torch.cuda.empty_cache(); began = time.time()
    o, lr, seed = options_of(spec); torch.manual_seed(seed)
    model = Model(o).to(DEVICE); optimizers = optimizers_of(model, o, lr); early = {0: inside(model, o, writes_only=True)}
    if DEVICE.type == "cuda":
        for part in (model.expand, *model.blocks, model.readout): part.compile(fullgraph=True)
    data, losses, seen, paused, clock = order(seed), [], {}, 0.0, None
    for step in range(STEPS):
        factor = min(1, (step + 1) / WARM) * (0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - WARM) / max(1, STEPS - WARM))))
        for optimizer in optimizers:
            for group in optimizer.param_groups: group["lr"] = group["base"] * factor
        with torch.autocast(DEVICE.type, torch.bfloat16): loss = model(rows(train, data[step]))
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); [x.step() for x in optimizers]; model.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 20: torch.cuda.synchronize(); clock = time.time()
        if clock and step + 1 in (STEPS // 4, STEPS // 2, 3 * STEPS // 4):
            torch.cuda.synchronize(); t = time.time(); seen[step + 1] = round(evaluate(model)[0], 4); early[step + 1] = inside(model, o, writes_only=True); torch.cuda.synchronize(); paused += time.time() - t
    torch.cuda.synchronize(); speed = BATCH * LENGTH * (STEPS - 21) / (time.time() - clock - paused) / 1e3 if clock else None
    whole, half = evaluate(model); rank, cosine, found = inside(model, o)
    row = dict(spec=spec, val=round(whole, 4), val_480=round(half, 4), during=seen, train_last=round(float(torch.stack(losses[-100:]).float().mean()), 4), ktok_s=speed and round(speed, 1), rank=rank and round(rank, 3), cosine=cosine and round(cosine, 3),
               parameters=sum(q.numel() for q in model.parameters()), gpu=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", shape=[WIDTH, DEPTH, HEADS], steps=STEPS, batch=BATCH, seconds=round(time.time() - began), instrument="forms", inside=found, inside_during=early)
    print(json.dumps(row), flush=True); open(a.out, "a").write(json.dumps(row) + "\n")


def check():
    """Each option builds, is causal, gives every parameter a finite gradient; each write is its formula, written out a token at a time."""
    global DEVICE, loss_of
    DEVICE, loss_of = torch.device("cpu"), loss_plain
    forms = [*NAMES, "mended+erase=read", "mended+erase=random", "mended+erase=shared", "mended+dynread=1", "writeonly+dynread=1", "constant+dynread=1", "mended+vread=1", "writeonly+betach=1", "mended+betach=1", "mended+kgain=1", "mended+decay=1",
             "mended+gate=layer", "mended+gate=fixed", "mended+target=linear", "mended+target=sigmoid+scale=4", "mended+source=context", "mended+v0=1", "mended+ec=0", "mended+dv=2", "mended+dv=1", "mended+share=0", "mended+cinit=published", "mended+cinit=small", "mended+cinit=folded", "mended+dv=1+rgain=1+cinit=small+c0=0.01", "mended+dv=1+zscale=0.01+eps=1e-8", "writeonly+dv=1+zscale=0", "additive+bnorm=0.01+tgate=1", "mended+fval=0.1", "mended+cinit=random", "mended+dv=1+rgain=1+cinit=published", "additive+bnorm=0.1+rgain=1+cinit=published", "expanded+cinit=published+noise=0.5", "mended+qk=before",
             "mended+scales=1+agate=1+ve=1+enorm=1", "additive+bnorm=0.1+scales=1+agate=1+ve=1", "additive+zero=1", "additive+ec=1", "additive+x0read=1", "additive+vx0=1", "expanded+bnorm=0", "writeonly+fres=0.25+femb=4+rdecay=0", "mended+muon=0"]
    for form in forms:
        o, lr, seed = options_of(form + "@1e-3"); torch.manual_seed(0); model = Model(o)
        ids = torch.randint(0, VOCABULARY, (2, 24)); other = ids.clone(); other[:, 12:] = torch.randint(0, VOCABULARY, (2, 12))
        with torch.no_grad():
            for q in model.parameters(): q.add_(0.02 * torch.randn_like(q))
            x, y = model.state(ids), model.state(other)
            assert torch.allclose(x[:, :12], y[:, :12], atol=1e-5), form + " sees the future"
            assert not torch.allclose(x[:, 12:], y[:, 12:]), form
        before = {n: q.detach().clone() for n, q in model.named_parameters()}
        loss = model(ids); loss.backward()
        for n, q in model.named_parameters():
            assert q.grad is not None and torch.isfinite(q.grad).all(), (form, n)
            assert float(q.grad.abs().max()) > 0 or (n.endswith(".value") and not o.zscale), (form, n, "gets no gradient")
        found = optimizers_of(model, o, lr); [x.step() for x in found]
        assert sum(q.numel() for x in found for g in x.param_groups for q in g["params"]) == sum(q.numel() for q in model.parameters()), form
        assert all(not torch.equal(before[n], q) for n, q in model.named_parameters() if o.zscale or not n.endswith(".value")), form
        if o.residual == "delta" and not (o.decay or o.kgain or o.dynread):
            r = model.blocks[0].residual_m; x0 = torch.randn(1, 2, o.dv, WIDTH); sub = nn.Linear(WIDTH, WIDTH)
            new = r(x0, x0, lambda c, *_: sub(c))
            for t in range(2):
                X = x0[0, t].double().T; C = r.own_read.double().T if o.dv > 1 or o.rgain else torch.ones(WIDTH, 1).double()
                xin = (C * X).sum(1); c = xin / (xin.square().mean() + o.eps).sqrt() * r.norm.double(); h = sub(c.float()).double(); k = h / h.norm()
                z = o.zscale * (r.value.double() @ (xin if o.source == "state" else c)) + r.value_bias.double() if o.target != "const" else None
                v = r.vector.double() if o.target == "const" else z if o.target == "linear" else o.scale * z.sigmoid() if o.target == "sigmoid" else o.scale * torch.tanh(o.slope / o.scale * z)
                beta = 2 * (r.beta.double() @ c + r.beta_bias.double()).sigmoid() if o.gate == "token" else 2 * r.beta_bias.double().sigmoid() if o.gate == "layer" else torch.ones(1).double()
                want = X + k[:, None] * (beta * v)[None]
                if o.erase != "none":
                    e = k if o.erase in ("shared", "apart") else r.e.double() if o.erase == "random" else F.normalize(r.egain.double() * xin, dim=0)
                    s = beta if o.erase == "shared" else 2 * (r.erase.double() @ c + r.erase_bias.double()).sigmoid()
                    want = want - e[:, None] * s * (e @ X)[None]
                gap = float((new[0, t].double().T - want).abs().max())
                assert gap < 1e-4, (form, gap)
        print("ok", form, round(float(loss), 4), sum(q.numel() for q in model.parameters()), flush=True)


if __name__ == "__main__":
    if a.check: check(); raise SystemExit
    for spec in a.specs: options_of(spec)  # a slip in the last is said before the first trains
    train, val = tokens("train.uint16.xz"), tokens("val.uint16.xz"); last = 0.0
    for spec in a.specs:
        if time.time() - T0 + last > a.seconds: print("no time for", spec, flush=True); break
        faulthandler.dump_traceback_later(a.hang, exit=True); began = time.time()
        try: run(spec); last = time.time() - began
        except Exception as error: print(json.dumps(dict(spec=spec, error=repr(error)[:400])), flush=True)
    faulthandler.cancel_dump_traceback_later()
