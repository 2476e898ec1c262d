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
from pathlib import Path
from typing import Any

COMPARE_DEFAULTS = {"out": "runs/compare", "trackers": "none"}  # its report has the curves
COMPARE_DECIDES = ("variant", "seed", "resume")  # fields of a recipe that compare sets itself
SIGNALLED = 128  # plus its number: what a shell expects of a program that a signal ended
INTERRUPTED = SIGNALLED + 2  # Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors a person can mend are one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = _parser().parse_known_args(words)
    if rest and options.run in (_prepare, _audit, _bench):
        near = difflib.get_close_matches(rest[0], [f"--{name}" for name in options.known], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see ddl {words[0]} --help"
        return _fail(f"unknown option {rest[0]!r}; {hint}")
    try:
        return options.run(options, rest)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"ddl: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ddl",
        description="Deep Delta Learning: train and compare residual streams that rewrite.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    jobs = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    prepare = jobs.add_parser(
        "prepare",
        help="turn text into token shards",
        description="Turn .txt, .jsonl(.gz/.zst/.xz) and .parquet files, folders of them, or a "
        "data set (NAME or NAME:CONFIGURATION) into token shards. An interrupted run goes on where "
        "it stopped.",
        allow_abbrev=False,
    )
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or a data set")
    prepare.add_argument("--out", required=True, type=Path, help="folder for the shards")
    prepare.add_argument("--tokenizer", help="name or path; default: the bundled tokenizer")
    prepare.add_argument(
        "--val-fraction", type=_fraction, default=0.01, help="documents kept for validation (0.01)"
    )
    prepare.add_argument(
        "--max-tokens", type=_count, metavar="N", help="stop at N tokens for training; default: all"
    )
    prepare.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="processes that tokenize, one thread each (1: this one, with threads)",
    )
    known = ("out", "tokenizer", "val-fraction", "max-tokens", "processes")
    prepare.set_defaults(run=_prepare, known=known)

    train = jobs.add_parser(
        "train",
        help="train one model by a recipe",
        usage="ddl train RECIPE.yaml [FIELDS.yaml ...] [--field value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("recipes", nargs="*", type=Path)
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run=_train)

    compare = jobs.add_parser(
        "compare",
        help="train several residuals by one recipe and report",
        usage="ddl compare [--variants a,b] [--seeds 0,1] [--field value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    compare.add_argument("--variants")
    compare.add_argument("--seeds")
    compare.add_argument("-h", "--help", action="store_true")
    compare.set_defaults(run=_compare)

    audit = jobs.add_parser(
        "audit",
        help="what a trained model does with its state",
        description="Gates, discrepancies, directions, channels and interventions of one "
        "checkpoint, or of two on the same tokens; report in OUT/audit.html.",
        allow_abbrev=False,
    )
    audit.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with a model")
    audit.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="one to compare")
    audit.add_argument("--data", default="bundled", help="prepared folder (the package's own text)")
    audit.add_argument("--out", type=Path, default=Path("runs/audit"), help="folder (runs/audit)")
    audit.add_argument(
        "--sequences", type=_count, default=32, metavar="N", help="of the validation split (32)"
    )
    audit.add_argument(
        "--seq-len", type=_count, metavar="T", help="tokens of one; default: as in training"
    )
    audit.add_argument(
        "--batch-size", type=_count, default=4, metavar="B", help="sequences of a pass (4)"
    )
    known = ("data", "out", "sequences", "seq-len", "batch-size")
    audit.set_defaults(run=_audit, known=known)

    bench = jobs.add_parser(
        "bench",
        help="time operations or whole models, checked against the reference first",
        description="Time single operations or whole models. Every row is checked against the "
        "reference first; what differs gets no figures, and the command ends with an error.",
        allow_abbrev=False,
    )
    whats = bench.add_subparsers(metavar="WHAT", required=True, parser_class=_Parser)
    _add_bench(whats, "op", "single operations: time and share of copy bandwidth", BENCH_OP)
    _add_bench(whats, "model", "training steps and prefill of whole models", BENCH_MODEL)
    return parser


def _add_bench(whats, what: str, about: str, options: Mapping[str, tuple[Any, ...]]) -> None:
    parser = whats.add_parser(what, help=about, description=f"Time {about}.", allow_abbrev=False)
    for name, (kind, default, text) in {**options, **BENCH_BOTH}.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            # Defaults are written as they would be typed; argparse reads them like a typed word.
            shown = text if default is None else f"{text} ({default})"
            parser.add_argument(f"--{name}", type=kind, default=default, metavar="", help=shown)
    parser.set_defaults(run=_bench, what=what, known=(*options, *BENCH_BOTH))


class _Version(argparse.Action):
    def __init__(self, **kwargs):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"ddl {version('deep-delta-learning')}")
        parser.exit(0)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


def _prepare(options: argparse.Namespace, rest: list[str]) -> int:
    from deep_delta.data import prepare

    prepare(
        options.inputs,
        options.out,
        tokenizer=options.tokenizer,
        val_fraction=options.val_fraction,
        max_tokens=options.max_tokens,
        processes=options.processes,
    )
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _count(text: str) -> int:
    return _whole(text, least=1)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _rebuild(text: str) -> list[int | str]:
    values: list[int | str] = []
    for part in text.split(","):
        if part not in ("speed", "memory") and not part.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not speed, memory or a whole number")
        values.append(int(part) if part.isdecimal() else part)
    return values


def _whole(text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


# The options of `ddl bench`: how a word is read, the default, and what it is for.
BENCH_OP: dict[str, tuple[Any, ...]] = {
    "ops": (_names, "read,reads,reduce,rewrite,expand,additive", "comma-separated"),
    "width": (_count, "768", "d"),
    "value-channels": (_counts, "1,4", "d_v, comma-separated"),
    "kernel-sizes": (_counts, "1,4", "K of the compressor in tokens, comma-separated"),
    "tokens": (_count, None, "B·T; without it 32768 on a GPU, 2048 on a CPU"),
    "dtype": (str, "bfloat16", "of the state and the activations"),
    "repeats": (_count, "50", "timed calls, of which the median counts"),
    "sweep": (bool, False, "d 768, 1024, 2048, 4096 by d_v 1, 2, 4, 8"),
}
BENCH_MODEL: dict[str, tuple[Any, ...]] = {
    "variants": (_names, "ddl-scalar,ddl-cc", "comma-separated; additive is always added"),
    "size": (str, "small", "tiny, small or medium"),
    "batch": (_count, "32", "sequences of a batch"),
    "seq-len": (_count, "1024", "tokens of a sequence"),
    "state-dtype": (str, "bfloat16", "of the state"),
    "rebuild": (
        _rebuild,
        "speed",
        "states rebuilt between two stored ones: speed, memory, numbers; comma-separated (triton)",
    ),
    "gradient-checkpointing": (bool, False, "recompute every layer in the backward pass"),
    "cuda-graphs": (bool, False, "replay steps as CUDA graphs, so that no GPU waits for the host"),
    "loss": (str, "torch", "torch or liger"),
    "modes": (_names, "train,prefill", "comma-separated"),
    "steps": (_count, "20", "timed steps, of which the median counts"),
    "warmup": (_count, "5", "steps before those"),
}
BENCH_BOTH: dict[str, tuple[Any, ...]] = {
    "providers": (
        _names,
        None,
        "reference, compile, triton; without it all (op), triton or, on a CPU, reference (model)",
    ),
    "csv": (Path, None, "file to append the rows to"),
}


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    _need("train", "psutil")
    names = [name.replace("-", "_") for name in options.known]
    given = {name: getattr(options, name) for name in names}
    given["command"] = "ddl " + shlex.join(sys.argv[1:])
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
        print("usage: ddl train RECIPE.yaml [FIELDS.yaml ...] [--field value ...]\n")
        print("Train one model; its folder is OUT/VARIANT/seed-SEED. Later files and options")
        print("replace fields of earlier ones. Fields of a recipe:\n")
        return _print_fields()
    from deep_delta.errors import UserError

    if not options.recipes:
        raise UserError("train needs a recipe: ddl train RECIPE.yaml [--field value ...]")
    _need("train", "accelerate", "psutil", "yaml")
    from deep_delta.train import Interrupted, load_recipe, merge, parse_overrides, train
    from deep_delta.train.processes import is_main, leave

    recipe = merge(load_recipe(*options.recipes), parse_overrides(rest))
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
        print("usage: ddl compare [--variants a,b] [--seeds 0,1] [--field value ...]\n")
        print("Train every variant with every seed by one recipe; report in OUT/report.html.\n")
        print("  --variants               comma-separated; default: two additive models, write-")
        print("                           only, DDL-CC and scalar DDL")
        print("  --seeds                  comma-separated; default: 0,1,2\n")
        print("Fields of the recipe:\n")
        return _print_fields(without=COMPARE_DECIDES, defaults=COMPARE_DEFAULTS)
    _need("train", "accelerate", "psutil", "yaml")
    _need("report", "matplotlib", "rich")
    from deep_delta.compare import DEFAULT_SEEDS, DEFAULT_VARIANTS, compare
    from deep_delta.errors import UserError
    from deep_delta.train import Interrupted, make_recipe, parse_overrides
    from deep_delta.train.processes import leave

    overrides = parse_overrides(rest, also=("variants", "seeds"))
    for field in COMPARE_DECIDES:
        if field in overrides:
            raise UserError(f"compare takes no --{field}: it is about --variants and --seeds")
    recipe = make_recipe({**COMPARE_DEFAULTS, **overrides}, origin="the command line")
    variants = options.variants.split(",") if options.variants else list(DEFAULT_VARIANTS)
    try:
        seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else DEFAULT_SEEDS
    except ValueError:
        raise UserError(
            f"--seeds is {options.seeds!r}; it must be whole numbers like 0,1,2"
        ) from None
    try:
        command = "ddl " + shlex.join(sys.argv[1:])
        compare(recipe, [name.strip() for name in variants], list(seeds), command)
    except Interrupted as stop:
        line = "interrupted; the same command goes on with what is missing"
        return _fail(line, SIGNALLED + stop.signal)
    leave()
    return 0


def _audit(options: argparse.Namespace, rest: list[str]) -> int:
    _need("train", "psutil", "yaml")
    _need("report", "matplotlib")
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
            context=environment("ddl " + shlex.join(sys.argv[1:])),
        )
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    print(f"report: {options.out / 'audit.html'}")
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


if __name__ == "__main__":
    sys.exit(main())
