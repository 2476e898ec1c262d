"""Does the best learning rate stay put when a model gets wider? A sweep with and without µP.

    python3 scripts/mup_transfer.py --out runs/mup

trains a four-layer model on the bundled text at every width and learning rate, in the standard
parametrisation and under µP (`mup_base_width` is the first width), and writes OUT/sweep.csv and
OUT/VARIANT-STEPS-steps.png; a table comes last. What the CSV has is not trained again, so that the
same command goes on after an interruption, and draws elsewhere what a machine without matplotlib
has trained. Batches, schedule and evaluation are the same in all runs of a seed. See docs/mup.md.
Whether it works at all shows `--widths 64 128 --steps 2`.
"""

import argparse
import csv
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import torch
from torch import Tensor

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.data import TokenShards, prepare_bundled
from deep_delta.errors import UserError
from deep_delta.model.capture import captured
from deep_delta.report.render import in_house_style, new_figure, save_png
from deep_delta.train.groups import parameter_groups

RATES = tuple(2.0**power for power in range(-10, -1))
STANDARD, MUP = "standard", "µP"
HEAD_DIM = 64  # the same at every width: wider models have more heads
BATCH, LENGTH, EVALUATED = 16, 256, 128  # sequences a step, tokens each, validation sequences
COLOURS = ("#0f76bd", "#d55e00", "#7d57c2", "#12946c")  # one a width


class Cell(NamedTuple):
    """One training: a row of the CSV, without its result."""

    variant: str
    parametrisation: str
    base: int
    width: int
    lr: float
    seed: int
    steps: int


Losses = dict[Cell, float]


def config_of(cell: Cell) -> DeepDeltaConfig:
    if cell.width % HEAD_DIM:
        raise UserError(f"width {cell.width} is not a multiple of {HEAD_DIM}, a head's")
    sizes: dict[str, Any] = {
        "hidden_size": cell.width,
        "num_attention_heads": cell.width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "mup_base_width": cell.base if cell.parametrisation == MUP else None,
    }
    return DeepDeltaConfig.from_preset(cell.variant, "tiny", parameterization="published", **sizes)


def sequences(folder: Path, split: str, device: torch.device) -> Tensor:
    """The split's whole sequences, (N, LENGTH)."""
    shards = TokenShards.open(folder, split)
    count = len(shards) // LENGTH
    return torch.from_numpy(shards.tokens(0, count * LENGTH)).view(count, LENGTH).to(device)


def share_of_peak(step: int, steps: int) -> float:
    """The schedule: a tenth of the steps linear warm-up, then a cosine to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(cell: Cell, train_data: Tensor, val_data: Tensor) -> float:
    """The validation loss in nats per token after the last step; NaN if the run diverged."""
    torch.manual_seed(cell.seed)
    device = train_data.device
    on_gpu = device.type == "cuda"
    model = DeepDeltaForCausalLM(config_of(cell)).to(device).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, cell.lr, 0.1), betas=(0.9, 0.95), fused=on_gpu
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: share_of_peak(i, cell.steps))

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            return model(ids, labels=ids, skip_logits=True, use_cache=False).loss

    def forward_backward(ids: Tensor) -> Tensor:
        loss = loss_of(ids)
        loss.backward()
        return loss.detach()

    generator = torch.Generator().manual_seed(cell.seed)
    epochs = -(-cell.steps * BATCH // len(train_data))
    order = torch.cat([torch.randperm(len(train_data), generator=generator) for _ in range(epochs)])
    batches = order[: cell.steps * BATCH].view(cell.steps, BATCH).to(device)
    if on_gpu:  # small models: launching their kernels would take longer than running them
        forward_backward(train_data[batches[0]])
        model.zero_grad(set_to_none=True)
        forward_backward = captured(forward_backward, train_data[batches[0]])
    for batch in batches:
        forward_backward(train_data[batch])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not on_gpu:  # a graph replaces the gradients where they lie
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        losses = [loss_of(ids) for ids in val_data[:EVALUATED].split(BATCH)]
    loss = torch.stack(losses).mean().item()
    return loss if math.isfinite(loss) else math.nan


def read(path: Path) -> Losses:
    """The trainings that the CSV has; UserError if it is none of this script's."""
    if not path.is_file():
        return {}
    types = Cell.__annotations__
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {
                Cell(*(types[name](row[name]) for name in Cell._fields)): float(row["val_loss"])
                for row in csv.DictReader(file)
            }
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a sweep of this script: choose another --out") from None


def sweep(cells: list[Cell], out: Path) -> Losses:
    """Train what OUT/sweep.csv has not, a row at a time."""
    path = out / "sweep.csv"
    done = read(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = prepare_bundled(out / "data")
    train_data, val_data = (sequences(folder, split, device) for split in ("train", "val"))
    with path.open("a", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        if not done:
            rows.writerow([*Cell._fields, "val_loss"])
        for number, cell in enumerate(cells, start=1):
            if cell in done:
                continue
            start = time.perf_counter()
            same = cell._replace(parametrisation=STANDARD)
            # At the base width both are the same model and the same steps, bit for bit.
            known = done.get(same) if cell.width == cell.base else None
            done[cell] = train(cell, train_data, val_data) if known is None else known
            rows.writerow([*cell, f"{done[cell]:.5f}"])
            file.flush()
            seconds = time.perf_counter() - start
            print(f"{number}/{len(cells)} {cell.variant} {cell.parametrisation} {cell.width} "
                  f"lr {cell.lr:.5f} seed {cell.seed}: {done[cell]:.4f} nats "
                  f"in {seconds:.1f} s", flush=True)  # fmt: skip
    return {cell: done[cell] for cell in cells}


Curve = dict[float, float]  # learning rate -> loss; NaN where it diverged
Curves = dict[str, dict[int, list[Curve]]]  # parametrisation -> width -> one curve a seed


def curves(losses: Losses, variant: str) -> Curves:
    by_seed: dict[tuple[str, int, int], Curve] = {}
    for cell, loss in losses.items():
        if cell.variant == variant:
            by_seed.setdefault((cell.parametrisation, cell.width, cell.seed), {})[cell.lr] = loss
    found: Curves = {STANDARD: {}, MUP: {}}
    for (parametrisation, width, _), curve in by_seed.items():
        found[parametrisation].setdefault(width, []).append(curve)
    return found


def mean(of_seeds: list[Curve]) -> Curve:
    return {lr: sum(curve[lr] for curve in of_seeds) / len(of_seeds) for lr in of_seeds[0]}


def best(curve: Curve) -> float:
    """The swept learning rate of the lowest loss."""
    return min(curve, key=lambda lr: math.inf if math.isnan(curve[lr]) else curve[lr])


def optimum(curve: Curve) -> float:
    """log₂ of the best learning rate: the lowest point of the parabola through the lowest loss and
    those of its neighbours, an octave away. ±∞ where the sweep ends there, or a neighbour diverged.
    """
    lr = best(curve)
    down, here, up = (curve.get(rate, math.nan) for rate in (lr / 2, lr, lr * 2))
    if math.isnan(down):
        return -math.inf
    if math.isnan(up):
        return math.inf
    return math.log2(lr) + (down - up) / (2 * (down - 2 * here + up))


@in_house_style
def draw(found: Curves, variant: str) -> Any:
    """Validation loss against learning rate, a panel a parametrisation, a line a width.

    Lines are means over seeds, each of which is a pale dot; a star is the lowest mean.
    """
    figure, left = new_figure(6.6, 2.9, (0.6, 3.45, 0.5, 0.4))
    box = left.get_position()
    right = figure.add_axes((box.x0 + 0.475, box.y0, box.width, box.height), sharey=left)
    means = {name: {w: mean(each) for w, each in of.items()} for name, of in found.items()}
    every = [loss for widths in means.values() for c in widths.values() for loss in c.values()]
    lowest = min(filter(math.isfinite, every), default=0.0)
    left.set_ylim(lowest - 0.05, lowest + 0.9)  # what learns badly leaves at the top
    left.set_ylabel("val loss (nats/token)")
    for axes, (name, widths) in zip((left, right), means.items(), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(RATES[::2], [f"{lr:.2g}" for lr in RATES[::2]])
        axes.set_xlabel("learning rate")
        axes.set_title(f"{variant}, {name}", fontsize=9)
        for colour, (width, curve) in zip(itertools.cycle(COLOURS), widths.items(), strict=False):
            for one in found[name][width]:
                axes.plot(one.keys(), one.values(), ".", color=colour, alpha=0.35, markersize=3)
            axes.plot(curve.keys(), curve.values(), color=colour, label=f"width {width}")
            axes.plot([best(curve)], [curve[best(curve)]], color=colour, marker="*", markersize=11)
    right.legend(frameon=False, fontsize=8)
    return figure


def table(found: Curves, variant: str) -> list[str]:
    """A line a width: its best learning rate, and what the base width's costs there."""
    lines = []
    for name, widths in found.items():
        base = best(mean(next(iter(widths.values()))))
        for width, of_seeds in widths.items():
            curve, each = mean(of_seeds), sorted(map(optimum, of_seeds))
            lines.append(
                f"{variant:12}{name:10}{width:>6}{math.log2(best(curve)):>9.0f}"
                f"{sum(each) / len(each):>9.2f}  {f'[{each[0]:.2f}, {each[-1]:.2f}]':16}"
                f"{curve[best(curve)]:>9.4f}{curve[base] - curve[best(curve)]:>+10.4f}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["ddl-cc"])
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512], help="base first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/mup"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be positive")
    variants, widths = options.variants, options.widths
    grid = itertools.product(variants, (STANDARD, MUP), widths[:1], widths, RATES, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        losses = sweep([Cell(*values, options.steps) for values in grid], options.out)
        found = {variant: curves(losses, variant) for variant in variants}
    except (UserError, ValueError) as error:
        sys.exit(f"mup_transfer: {error}")
    for variant in variants:
        try:
            path = options.out / f"{variant}-{options.steps}-steps.png"
            save_png(draw(found[variant], variant), path)
        except UserError as error:
            print(f"no plot yet, the CSV is complete: {error}; then the same command draws it")
    print(f"{'variant':12}{'':10}{'width':>6}{'best':>9}{'vertex':>9}  {'of seeds':16}"
          f"{'val loss':>9}{'lost':>10}")  # fmt: skip
    for variant in variants:
        print("\n".join(table(found[variant], variant)))
    print(
        "best: log2 of the best learning rate of the mean over seeds; vertex: of the parabolas\n"
        "through it, mean and range over seeds; lost: nats by using the first width's best here"
    )


if __name__ == "__main__":
    main()
