"""The options of the command `ddl`: what may be typed, and how it is read."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _count(text: str) -> int:
    return _whole(text, least=1)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _shots(text: str) -> list[int]:
    return [_whole(part, least=0) for part in text.split(",")]


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
COMPARE = {
    "variants": "comma-separated arms that are variants as they are",
    "arm": "one arm, 'VARIANT' or 'NAME = VARIANT field=value ...'; may be given again and again",
    "baseline": "the arm that others are set against (additive, where it is one)",
    "contrast": "'ARM - REFERENCE' in place of every arm against the baseline; may be repeated",
    "lr": "comma-separated: every arm at its own best, chosen on the validation text",
    "rate-seeds": "of the trainings that choose a rate, which are not reported (1000)",
    "seeds": "comma-separated, of those that are reported (0,1,2)",
    "budgets": "tokens, comma-separated: the baseline's curve, to read an arm's loss as tokens",
}
COMPARE_REPEATED = ("arm", "contrast")
BENCH_BOTH: dict[str, tuple[Any, ...]] = {
    "providers": (
        _names,
        None,
        "reference, compile, triton; without it all (op), triton or, on a CPU, reference (model)",
    ),
    "csv": (Path, None, "file to append the rows to"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"ddl: {message} (see {self.prog} --help)\n")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and the words that only a recipe knows; ends the program on errors.

    `recipes` are the words before the first option: behind an option, a word is its value.
    """
    options, rest = make_parser().parse_known_args(words)
    if hasattr(options, "takes_recipes"):
        first = next((at for at, word in enumerate(rest) if word.startswith("-")), len(rest))
        options.recipes, rest = rest[:first], rest[first:]
    return options, rest


def make_parser() -> argparse.ArgumentParser:
    """The parser of `ddl`: `run` is the job, `known` its options where there are no others."""
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
        "--test-fraction",
        type=_fraction,
        default=0,
        help="others kept for a test when all is chosen (0: no such split)",
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
    known = ("out", "tokenizer", "val-fraction", "test-fraction", "max-tokens", "processes")
    prepare.set_defaults(run="prepare", known=known)

    train = jobs.add_parser(
        "train",
        help="train one model by a recipe",
        usage="ddl train RECIPE [FIELDS ...] [--field value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run="train", takes_recipes=True)

    compare = jobs.add_parser(
        "compare",
        help="train several arms by one recipe and report",
        usage="ddl compare [RECIPE ...] [--arm 'NAME = VARIANT f=v'] ... [--field value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    for name in COMPARE:
        more = name in COMPARE_REPEATED
        compare.add_argument(f"--{name}", action="append" if more else "store")
    compare.add_argument("-h", "--help", action="store_true")
    compare.set_defaults(run="compare", takes_recipes=True)

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
    audit.set_defaults(run="audit", known=("data", "out", "sequences", "seq-len", "batch-size"))

    _add_eval(jobs)

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


def _add_eval(jobs) -> None:
    parser = jobs.add_parser(
        "eval",
        help="loss on prepared text and scores on tasks, for one checkpoint",
        description="Evaluate one checkpoint (a folder that save_pretrained or ddl train wrote): "
        "the loss on a split of --data, and the paper's eight multiple-choice tasks "
        "through lm-evaluation-harness. Without --data the tasks alone, with it they need --tasks "
        "or --task-data. An interrupted run goes on with the parts that are missing.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT")
    add("--data", type=Path, metavar="DIR", help="a folder made by ddl prepare")
    add("--split", choices=("val", "test"), default="val", help="of --data (val)")
    add("--tasks", type=_names, help="comma-separated, or all")
    add("--shots", type=_shots, default="0,1", help="examples before a question (0,1)")
    add("--task-data", type=Path, metavar="DIR", help="TASK/SPLIT.jsonl files; default: the hub")
    add("--batch-size", type=_count, default=8, metavar="N", help="sequences at once (8)")
    add("--context", type=_count, metavar="N", help="tokens of a window; default: the model's")
    add("--limit", type=_count, metavar="N", help="the first N documents and questions: a trial")
    add("--out", type=Path, metavar="DIR", help="default: CHECKPOINT-eval")
    known = (
        "data",
        "split",
        "tasks",
        "shots",
        "task-data",
        "batch-size",
        "context",
        "limit",
        "out",
    )
    parser.set_defaults(run="eval", known=known)


def _add_bench(whats, what: str, about: str, options: Mapping[str, tuple[Any, ...]]) -> None:
    parser = whats.add_parser(what, help=about, description=f"Time {about}.", allow_abbrev=False)
    for name, (kind, default, text) in {**options, **BENCH_BOTH}.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            # Defaults are written as they would be typed; argparse reads them like a typed word.
            shown = text if default is None else f"{text} ({default})"
            parser.add_argument(f"--{name}", type=kind, default=default, metavar="", help=shown)
    parser.set_defaults(run="bench", what=what, known=(*options, *BENCH_BOTH))


class _Version(argparse.Action):
    def __init__(self, **kwargs):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"ddl {version('deep-delta-learning')}")
        parser.exit(0)
