"""Does a state in bf16 cost loss? Runs that differ in the state's dtype alone, paired by seed.

    python3 scripts/state_dtype.py --data DATA --seeds 0,1,2,3

trains each seed twice under bf16 autocast, with the state in bf16 and in fp32, and prints the
difference of the validation losses after every pair. bf16 becomes the default when the upper end of
the 95 % interval is below 0.003 nats. Finished runs are kept in OUT and not repeated, so that the
same command goes on after an interruption, or with more seeds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import torch

from deep_delta.compare.statistics import judge
from deep_delta.train.recipe import Recipe
from deep_delta.train.run import train

DTYPES = ("bfloat16", "float32")
LIMIT = 0.003  # nats
MODEL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}


def recipe(options: argparse.Namespace, seed: int, dtype: str) -> Recipe:
    return Recipe(
        variant=options.variant,
        size="small",
        model={**MODEL, "num_key_value_heads": 8, "state_dtype": dtype},
        data=options.data,
        out=str(options.out / dtype),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch,
        seq_len=512,
        lr=1e-3,
        warmup_steps=options.steps // 15,
        eval_every=options.steps,
        eval_sequences=None,
        log_every=max(options.steps // 30, 1),
        precision="bf16",
        compile=torch.cuda.is_available(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder made by ddl prepare")
    parser.add_argument("--variant", default="ddl-cc")
    parser.add_argument("--seeds", default="0,1,2,3", help="comma-separated")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 512 tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/state-dtype"))
    options = parser.parse_args()
    losses: dict[str, dict[int, float]] = {dtype: {} for dtype in DTYPES}
    for seed in (int(word) for word in options.seeds.split(",")):
        for dtype in DTYPES:
            found = train(recipe(options, seed, dtype)).val_loss
            assert found is not None
            losses[dtype][seed] = found
        one = ", ".join(f"{dtype} {losses[dtype][seed]:.5f}" for dtype in DTYPES)
        (all_of_them,) = judge(losses, [DTYPES]).contrasts
        bounds = ""
        high = all_of_them.bonferroni_high  # of one contrast: Student's t interval
        if high is not None:
            bounds = f", 95 % interval {all_of_them.bonferroni_low:+.5f} to {high:+.5f}"
        mean = f"bfloat16 − float32: {all_of_them.mean:+.5f} nats"
        print(f"{options.variant} seed {seed}: {one}; {mean} (n = {all_of_them.n}{bounds})")
    if high is None:
        print("fewer than three seeds: no decision")
    else:
        below = high < LIMIT
        print(f"upper end {'below' if below else 'not below'} {LIMIT} nats")


if __name__ == "__main__":
    main()
