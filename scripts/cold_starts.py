"""Cold starts of pairs of processes: does one hang, and how long do the first steps take?

    python3 scripts/cold_starts.py --code old=OLD_CHECKOUT --code new=. --rounds 1,3,3,3

A start is a process that trains three models one after another for a few steps, compiled, with
`torch._dynamo.reset()` between. Two starts, one on each GPU, share one empty folder of compilers'
caches: a pair. A round starts so many pairs of each code at once. What takes longer than --limit
has hung: its stacks go to hung.txt, as rows go to rows.jsonl. No round begins that would not end
within --seconds, as the longest before it did; what still runs then is cut.

On a CPU nothing is compiled: the script only shows that it works.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODELS = ("additive", "additive", "write-only-cc")
WIDTHS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
STEPS, BATCH, LENGTH, VOCABULARY, LAYERS = 3, 8, 256, 50304, 2
DUMP_AFTER = 60  # seconds in one model


def child() -> None:
    """Train the models; print a line of JSON for each."""
    faulthandler.enable()
    import torch

    from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
    from deep_delta.model.compile import compile_layers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {**WIDTHS, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    for place, variant in enumerate(MODELS):
        torch._dynamo.reset()
        faulthandler.dump_traceback_later(DUMP_AFTER, repeat=True)
        config = DeepDeltaConfig.from_preset(
            variant, "tiny", parameterization="published", **fields
        )
        model = DeepDeltaForCausalLM(config).train().to(device)
        if device == "cuda":
            compile_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        began = time.monotonic()
        for _ in range(STEPS):
            ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device=device)
            with torch.autocast(device, torch.bfloat16):
                output = model(ids, labels=ids, skip_logits=True, use_cache=False)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"model": place, "variant": variant, "loss": round(output.loss.item(), 3)}  # waits
        print(json.dumps({**row, "seconds": round(time.monotonic() - began, 2)}), flush=True)
    faulthandler.cancel_dump_traceback_later()


@dataclass
class Start:
    code: str
    pairs: int  # of each code at once
    log: Path
    process: subprocess.Popen
    began: float
    row: dict

    def finish(self, end: str, out: Path) -> None:
        """Stacks of all threads into the log, the end of what it started, and its row."""
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        text = self.log.read_text(errors="replace")
        models = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        self.row = {"code": self.code, "pairs": self.pairs, "end": end, "models": models}
        with (out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(self.row) + "\n")
        if end != "done":
            with (out / f"{end}.txt").open("a") as file:
                file.write(f"== {self.code}\n{text}\n")


def start(code: str, folder: Path, device: int, caches: Path, pairs: int) -> Start:
    own = {
        "PYTHONPATH": str(folder.resolve()),
        "CUDA_VISIBLE_DEVICES": str(device),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    log = caches / f"log-{device}"
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--child"]
    with log.open("w") as out:  # a session of its own: the compiler's processes end with it
        process = subprocess.Popen(
            command, env={**os.environ, **own}, stdout=out, stderr=out, start_new_session=True
        )
    return Start(code, pairs, log, process, time.monotonic(), {})


def wait_for(starts: list[Start], limit: float, deadline: float, out: Path) -> None:
    while waiting := [one for one in starts if not one.row]:
        time.sleep(0.2)
        for one in waiting:
            if one.process.poll() is not None:
                one.finish("done" if one.process.returncode == 0 else "failed", out)
            elif time.monotonic() - one.began > limit:
                one.finish("hung", out)
            elif time.monotonic() > deadline:
                one.finish("cut", out)


def table(rows: list[dict]) -> str:
    """Starts, how they ended, and seconds of each model's first steps: median, largest."""
    heads = ["code", "pairs at once", "starts", "hung", "failed", "cut", *MODELS]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for code, pairs in sorted({(row["code"], row["pairs"]) for row in rows}):
        group = [row for row in rows if (row["code"], row["pairs"]) == (code, pairs)]
        ends = [row["end"] for row in group]
        cells = [code, pairs, len(group), *map(ends.count, ("hung", "failed", "cut"))]
        for place in range(len(MODELS)):
            found = [m["seconds"] for row in group for m in row["models"] if m["model"] == place]
            cells.append(f"{statistics.median(found):.1f}, {max(found):.1f}" if found else "—")
        lines.append(" | ".join(map(str, cells)))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", action="append", help="NAME=FOLDER with deep_delta in it")
    parser.add_argument("--rounds", default="1,3,3,3,3", help="pairs of each code in each round")
    parser.add_argument("--seconds", type=float, default=270)
    parser.add_argument("--limit", type=float, default=150, help="seconds of one start")
    parser.add_argument("--out", type=Path, default=Path("runs/cold-starts"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return
    here = f"here={Path(__file__).resolve().parents[1]}"
    codes = [word.partition("=")[::2] for word in options.code or [here]]
    options.out.mkdir(parents=True, exist_ok=True)
    began, longest, starts = time.monotonic(), 0.0, list[Start]()
    for pairs in map(int, options.rounds.split(",")):
        round_began, these = time.monotonic(), list[Start]()
        if round_began + longest > began + options.seconds:
            print("no time for another round")
            break
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
            for code, folder in codes * pairs:
                pair = Path(caches, f"{code}-{len(these)}")
                pair.mkdir()
                these += [start(code, Path(folder), gpu, pair, pairs) for gpu in (0, 1)]
            wait_for(these, options.limit, began + options.seconds, options.out)
        starts += these
        longest = max(longest, time.monotonic() - round_began)
        rows = [one.row for one in starts]
        print(f"{table(rows)}\n{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
