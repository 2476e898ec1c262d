"""Do coordinates keep their size when a model gets wider? State, context, output, write, and more.

    python3 scripts/coordinate_check.py --out runs/coordinates

trains models of several widths for a few AdamW steps on one batch, with and without µP
(`mup_base_width`), and prints the root mean square of each quantity after the last step at each
width: state X, context c, sublayer output h, write β k (vᵀ − kᵀX), gate β − β₀ and logits; and how
far apart the widths are, the largest over the smallest. Under µP that should stay near 1. Every
step is in OUT/coordinates.csv. See docs/mup.md.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import torch
from torch import Tensor, nn

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.residual import Residual
from deep_delta.train.groups import parameter_groups

WIDTHS = (128, 256, 512)
BASE_WIDTH = 128
HEAD_DIM = 32  # the same at every width: wider models have more heads
QUANTITIES = ("state", "context", "output", "write", "gate", "logits")
Sizes = dict[str, float]


def config_of(variant: str, width: int, mup: bool, **fields: Any) -> DeepDeltaConfig:
    """A small model: two layers, `width` features, the published code's parameterization."""
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "mup_base_width": BASE_WIDTH if mup else None,
    }
    fields = {"parameterization": "published", **sizes, **fields}
    return DeepDeltaConfig.from_preset(variant, "tiny", **fields)


class Coordinates:
    """Root mean squares of one forward pass, over all sublayers. Call it with token ids (B, T).

    There is no "gate" where nothing is erased.
    """

    def __init__(self, model: DeepDeltaForCausalLM):
        self.model = model
        self.seen: dict[str, list[Tensor]] = {}
        for layer in model.model.layers:
            for sublayer in (layer.self_attn, layer.mlp):
                sublayer.register_forward_hook(self._sublayer)
        for residual in model.modules():
            if isinstance(residual, Residual):
                residual.register_forward_hook(self._residual)

    def __call__(self, ids: Tensor) -> Sizes:
        self.seen = {name: [] for name in QUANTITIES}
        with torch.no_grad():
            self.seen["logits"].append(self.model(ids, use_cache=False).logits.square().mean())
        means = {name: torch.stack(seen).mean() for name, seen in self.seen.items() if seen}
        return {name: mean.sqrt().item() for name, mean in means.items()}

    def _sublayer(self, module: nn.Module, given: tuple, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        self._add("context", given[0])
        self._add("output", output)

    def _residual(self, module: nn.Module, given: tuple, result: Any) -> None:
        before, after = given[0].settle(), result.settle()
        self._add("state", after)
        self._add("write", after - before)
        if result.erase is not None:
            self._add("gate", result.erase - self.model.config.gate_init)

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self.seen:
            self.seen[name].append(tensor.detach().float().square().mean())


def measure(config: DeepDeltaConfig, steps: int, lr: float, seed: int = 0) -> list[Sizes]:
    """The sizes at the start and after each AdamW step on one batch of 4 × 32 random tokens."""
    torch.manual_seed(seed)
    model = DeepDeltaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.1), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (4, 32), generator=generator)
    coordinates = Coordinates(model)
    sizes = [coordinates(ids)]
    for _ in range(steps):
        coordinates.seen = {}  # nothing is recorded in training passes
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        sizes.append(coordinates(ids))
    return sizes


def spread(by_width: Mapping[int, Sizes]) -> Sizes:
    """Each quantity's largest size over its smallest, over the widths."""
    first, *_ = by_width.values()
    sizes = {name: [found[name] for found in by_width.values()] for name in first}
    return {name: max(values) / min(values) for name, values in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="additive,ddl-scalar,ddl-cc", help="comma-separated")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2, help="at the base width, 128")
    parser.add_argument("--out", type=Path, default=Path("runs/coordinates"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with (options.out / "coordinates.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["variant", "parametrisation", "width", "step", *QUANTITIES])
        for variant in options.variants.split(","):
            for mup in (False, True):
                name, last = "µP" if mup else "standard", {}
                for width in WIDTHS:
                    steps = measure(config_of(variant, width, mup), options.steps, options.lr)
                    for step, sizes in enumerate(steps):
                        rows.writerow([variant, name, width, step, *_cells(sizes)])
                    last[width] = steps[-1]
                    lines.append(_line(variant, name, str(width), _cells(last[width])))
                lines.append(_line("", "", "max/min", _cells(spread(last))))
    print(_line("variant", "", "width", QUANTITIES))
    print("\n".join(lines))


def _cells(sizes: Sizes) -> list[str]:
    return [f"{sizes[name]:.3f}" if name in sizes else "" for name in QUANTITIES]


def _line(variant: str, name: str, width: str, cells: Iterable[str]) -> str:
    return f"{variant:18}{name:10}{width:>8}" + "".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    main()
