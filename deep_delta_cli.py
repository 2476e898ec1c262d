"""The command `ddl`: one subcommand per job.

It stands outside the package, because importing that loads torch and transformers: `ddl --help`
and a mistyped option answer at once.
"""

import argparse
import difflib
import errno
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from deep_delta_options import COMPARE, COMPARE_REPEATED, parse

COMPARE_DEFAULTS = {"out": "runs/compare", "trackers": "none"}  # its report has the curves
# Fields of a recipe that compare sets itself.
COMPARE_DECIDES = ("variant", "seed", "name", "resume", "init")
SIGNALLED = 128  # plus its number: what a shell expects of a program that a signal ended
INTERRUPTED = SIGNALLED + 2  # Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors a person can mend are one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = parse(words)
    if rest and hasattr(options, "known"):
        near = difflib.get_close_matches(rest[0], [f"--{name}" for name in options.known], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see ddl {words[0]} --help"
        return _fail(f"unknown option {rest[0]!r}; {hint}")
    try:
        return RUN[options.run](options, rest)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", INTERRUPTED)
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        # A disk or a file may have failed this process alone.
        return _fail(line, only_one=getattr(error, "in_all", False))


def _one_line(error: Exception) -> str | None:
    """The message of an error that the user can put right; None for a bug, which keeps a trace."""
    from deep_delta.errors import UserError

    if isinstance(error, UserError):
        return " ".join(str(error).split())
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error) or "file write failed" in str(error):
        return "no disk space left: make room and give the same command again"
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        return f"{error.strerror}: {error.filename}"
    return None


def _fail(line: str, status: int = 1, only_one: bool = True) -> int:
    """Print the line, under torchrun by one process of a machine if `only_one` has to."""
    if not only_one or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"ddl: {line}", file=sys.stderr, flush=True)
    return status


def _command() -> str:
    """What was typed, for records and reports."""
    return "ddl " + shlex.join(sys.argv[1:])


def _prepare(options: argparse.Namespace, rest: list[str]) -> int:
    from deep_delta.data import prepare

    prepare(
        options.inputs,
        options.out,
        tokenizer=options.tokenizer,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        max_tokens=options.max_tokens,
        processes=options.processes,
    )
    return 0


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    _need("train", "psutil")
    names = [name.replace("-", "_") for name in options.known]
    given = {name: getattr(options, name) for name in names}
    given["command"] = _command()
    try:
        if options.what == "op":
            from deep_delta.bench.op import bench_op

            complete = bench_op(**given)
        else:
            from deep_delta.bench.model import bench_model

            complete = bench_model(**given)
    except KeyboardInterrupt:
        return _fail("interrupted; the rows above are measured, the others are not", INTERRUPTED)
    if complete:
        return 0
    return _fail("some rows have no figures: the table says why")


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    if options.help:
        print("usage: ddl train RECIPE [FIELDS ...] [--field value ...]\n")
        print("Train one model; its folder is OUT/VARIANT/seed-SEED. RECIPE and FIELDS are YAML")
        print("files or names of shipped ones. Later ones and options replace fields of earlier")
        print("ones. Fields of a recipe:\n")
        _print_fields()
        return _print_shipped()
    from deep_delta.errors import UserError

    if not options.recipes:
        raise UserError("train needs a recipe: ddl train tiny, or RECIPE.yaml [--field value ...]")
    _need("train", "accelerate", "psutil", "yaml")
    from deep_delta.train import (
        Interrupted,
        load_recipe,
        merge,
        parse_overrides,
        resolved,
        train,
    )
    from deep_delta.train.processes import is_main, leave

    said = parse_overrides(rest)
    recipe = resolved(merge(load_recipe(*options.recipes), said), said)
    try:
        train(recipe)
    except Interrupted as stop:
        less = " without --resume never" if recipe.resume == "never" else ""
        line = f"interrupted; the same command{less} goes on from the checkpoint"
        return _fail(line, SIGNALLED + stop.signal)
    if is_main():
        print(f"{recipe.run_folder / 'final'}")
    leave()
    return 0


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    if options.help:
        print(
            "usage: ddl compare [RECIPE ...] [--arm 'NAME = VARIANT f=v'] ... [--field value ...]"
        )
        print("\nTrain every arm by one recipe with every seed; report in OUT/report.html. Without")
        print(
            "arms: two additive models, write-only, DDL-CC and scalar DDL. A YAML file may say the"
        )
        print("same: arms, baseline, contrasts, lr, rate_seeds, seeds, budgets.\n")
        for name, text in COMPARE.items():
            print(f"  --{name:<23}{text}")
        print("\nFields of the recipe:\n")
        return _print_fields(without=(*COMPARE_DECIDES, "lr"), defaults=COMPARE_DEFAULTS)
    _need("train", "accelerate", "psutil", "yaml")
    _need("report", "matplotlib", "rich", "scipy")
    from deep_delta.compare import compare, read_study
    from deep_delta.train import Interrupted, parse_overrides
    from deep_delta.train.processes import leave

    overrides = parse_overrides(rest, also=tuple(COMPARE))
    given = {
        "arms": options.arm,
        "contrasts": options.contrast,
        **{
            name.replace("-", "_"): getattr(options, name.replace("-", "_"))
            for name in COMPARE
            if name not in COMPARE_REPEATED
        },
    }
    study = read_study(options.recipes, given, overrides, COMPARE_DEFAULTS)
    try:
        compare(study, _command())
    except Interrupted as stop:
        line = "interrupted; the same command goes on with what is missing"
        return _fail(line, SIGNALLED + stop.signal)
    leave()
    return 0


def _audit(options: argparse.Namespace, rest: list[str]) -> int:
    _need("train", "psutil", "yaml")
    _need("report", "matplotlib", "scipy")
    from deep_delta.audit import audit
    from deep_delta.bench.record import environment

    try:
        audit(
            [path for path in (options.checkpoint, options.other) if path is not None],
            options.out,
            data=options.data,
            sequences=options.sequences,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            context=environment(_command()),
        )
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    print(f"report: {options.out / 'audit.html'}")
    return 0


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    _need("report", "matplotlib")
    names = options.tasks or (["all"] if options.task_data or not options.data else [])
    if names:
        _need("eval", "lm_eval")
    from deep_delta.evaluate import TASKS, Settings, evaluate

    folder = options.checkpoint
    settings = Settings(
        data=options.data,
        split=options.split,
        tasks=tuple(TASKS if names == ["all"] else names),
        shots=tuple(options.shots),
        task_data=options.task_data,
        batch_size=options.batch_size,
        context=options.context,
        limit=options.limit,
    )
    whole = folder.resolve()  # "." has no name
    out = options.out or whole.with_name(f"{whole.name}-eval")
    evaluate(folder, out, settings, _command())
    return 0


def _print_fields(without: Sequence[str] = (), defaults: Mapping[str, str] = {}) -> int:
    import dataclasses

    _need("train", "yaml")
    from deep_delta.train.recipe import Recipe

    for field in dataclasses.fields(Recipe):
        if field.name in without:
            continue
        default = {} if field.default_factory is not dataclasses.MISSING else field.default
        shown = defaults.get(field.name, default)
        print(f"  --{field.name:<23}{field.metadata['help']} ({shown})")
    return 0


def _print_shipped() -> int:
    from deep_delta.train.recipe import SHIPPED, shipped_recipes

    print(f"\nShipped: {', '.join(shipped_recipes())}")
    print(f"They and launch/slurm.sh, for a run on several nodes, lie in {SHIPPED}")
    return 0


def _need(extra: str, *modules: str) -> None:
    """UserError naming the extra that brings a module which is not installed."""
    from importlib.util import find_spec

    from deep_delta.errors import UserError

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"this command needs {', '.join(missing)} from the extra {extra!r}: "
            f"pip install 'deep-delta-learning[{extra}]'"
        )


RUN = {
    "prepare": _prepare,
    "train": _train,
    "compare": _compare,
    "audit": _audit,
    "eval": _eval,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
