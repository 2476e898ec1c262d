"""The losses of every row, by case, of the loop in the tree that stands on the path: collect.py OUT.json"""
import json, sys, tempfile
from pathlib import Path
import torch
from train.micro import make_data, micro_recipe, losses
from train.group import together
from train import test_processes as tp
from deep_delta.model.presets import VARIANTS
from deep_delta.train import train

def main(out):
    torch.set_num_threads(1)
    rows = {}
    root = Path(tempfile.mkdtemp())
    data = make_data(root)
    common = dict(steps=30, save_every=10, keep_checkpoints=9, eval_every=15, precision="fp32")
    for variant in VARIANTS:
        for name, more in {"plain": {}, "masked, two passes": dict(mask_documents=True, micro_batch_size=2), "bf16": dict(precision="bf16")}.items():
            fields = {**common, **more}
            recipe = micro_recipe(data, root / name / "whole", variant=variant, **fields)
            train(recipe)
            rows[f"{variant}, {name}"] = losses(recipe.run_folder)
            rest = micro_recipe(data, root / name / "rest", variant=variant, resume=str(recipe.run_folder / "checkpoint-10"), **fields)
            train(rest)
            rows[f"{variant}, {name}, resumed"] = losses(rest.run_folder)
        print(variant, flush=True)
    for variant in ("additive", "ddl-scalar", "ddl-cc", "ddl-tc"):
        for name, go, more in (("ddp", tp.watched, {}), ("ddp masked", tp.watched, dict(mask_documents=True, micro_batch_size=1)), ("fsdp2", tp.sharded, dict(parallel="fsdp2"))):
            recipe = micro_recipe(data, root / name, variant=variant, **{**common, **more})
            together(go, recipe)
            rows[f"{variant}, {name}"] = losses(recipe.run_folder)
        print(variant, "two", flush=True)
    Path(out).write_text(json.dumps(rows))

if __name__ == "__main__":
    main(sys.argv[1])
