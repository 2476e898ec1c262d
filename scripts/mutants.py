"""Plant bugs one at a time and show which test catches each: `make mutants`.

Every bug is one exact replacement in a temporary copy of the package; the fitting tests then run
against the copy. Exits 1 if a bug survives, if a replacement no longer matches the code, or if
the tests are red without any bug.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
TIMEOUT = 240  # seconds a run; a test that hangs proves nothing, so it does not count

DELTA, TOKENS = "tests/ops/test_delta_rule.py", "tests/ops/test_tokens.py"
CONTRACT, MODEL = "tests/residual/test_contract.py", "tests/model/test_model.py"
DECODING, START = "tests/model/test_decoding.py", "tests/model/test_initialisation.py"
CONFIG, PUBLISHED = "tests/model/test_config.py", "tests/model/test_published.py"
FUSED, MEMORY = "tests/ops/test_fused.py", "tests/ops/test_fused_memory.py"
WIDE_TESTS = "tests/ops/test_wide.py"
SCALING, CALLS = "tests/model/test_width_scaling.py", "tests/model/test_calls.py"
BACKENDS, FUSED_MODEL = "tests/ops/test_backends.py", "tests/model/test_fused_model.py"

# Fails the run unless the copy is what Python imports (the package is installed as editable). Only
# after the collection, because conftest decides about Triton's interpreter before any import.
GUARD = """
from pathlib import Path

def pytest_collection_finish():
    import deep_delta
    assert Path(deep_delta.__file__).is_relative_to(Path(__file__).parent), deep_delta.__file__
"""


class Mutant(NamedTuple):
    bug: str
    file: str  # below deep_delta/
    old: str
    new: str
    tests: str
    select: str = ""  # pytest -k


REFERENCE, GENERATORS = "ops/reference.py", "residual/generators.py"
LAYERS, COMPRESS, SHARED = "residual/layers.py", "residual/compress.py", "residual/contract.py"
BUILD, MODELING = "model/build.py", "model/modeling.py"
INPUTS, CACHE = "model/inputs.py", "model/cache.py"
CONFIGURATION, GROUPS = "model/configuration.py", "train/groups.py"
FORWARD, BACKWARD = "ops/kernels/forward.py", "ops/kernels/backward.py"
GRADIENTS, WIDE = "ops/kernels/gradients.py", "ops/kernels/wide.py"
TILES, EMBEDDING = "ops/kernels/tiles.py", "ops/kernels/embedding.py"
DISPATCH, FUSED_LAUNCH, LAUNCH = "ops/dispatch.py", "ops/fused_launch.py", "ops/launch.py"

MUTANTS = [
    Mutant("no erase term", REFERENCE,
           "row - share.unsqueeze(-1) * _readout(channels, key)", "row", DELTA),
    Mutant("scale once, not twice, in the erase term", REFERENCE,
           "else erase * scale", "else erase", DELTA),
    Mutant("ε not squared", REFERENCE, "+ eps**2", "+ eps", DELTA),
    Mutant("length of the direction detached", REFERENCE,
           "wide = direction.to(", "wide = direction.detach().to(", DELTA),
    Mutant("computed in the state's bf16", REFERENCE,
           "dtype = torch.float32\n", "dtype = tensors[0].dtype\n", DELTA),
    Mutant("token compressor looks ahead", REFERENCE,
           "shift_tokens((channels * taps[last - step]).sum(-2), step, segments)",
           "(channels * taps[last - step]).sum(-2).roll(-step, 1)", TOKENS),
    Mutant("embedding convolution off by one tap", REFERENCE,
           "shifted.unsqueeze(-2), taps[last - step]",
           "shifted.unsqueeze(-2), taps[last - step + 1]", TOKENS),
    Mutant("documents not kept apart", REFERENCE,
           "segments == F.pad(segments, (steps, 0), value=-1)[:, :tokens]",
           "segments == segments", TOKENS),
    Mutant("gate is σ without the 2", GENERATORS,
           "return 2 * torch.sigmoid(logits)",
           "return torch.sigmoid(logits)", CONTRACT),
    Mutant("sigmoid value without its scale", GENERATORS,
           "self.scale * torch.sigmoid(logits)", "torch.sigmoid(logits)", CONTRACT),
    Mutant("direction detached from the sublayer", LAYERS,
           "read.state if reads_state else None, output)",
           "read.state if reads_state else None, output.detach())",
           CONTRACT, "gets_a_gradient"),
    Mutant("pending write dropped", LAYERS, "state.x,\n                *state[1:4],", "state.x,",
           CONTRACT),
    Mutant("pending write applied twice", LAYERS, "state.x,\n                *state[1:4],",
           "state.settle(),\n                *state[1:4],", CONTRACT),
    Mutant("value from x_in instead of the context", LAYERS,
           'value_on_state=self.value_source == "state"', "value_on_state=True", CONTRACT,
           "equation"),
    Mutant("value not gated", LAYERS, "strengths[0].unsqueeze(-1) * value", "value",
           CONTRACT, "equation"),
    Mutant("erase and write gates swapped", LAYERS,
           "strengths[0].unsqueeze(-1) * value,\n            strengths[-1] if",
           "strengths[-1].unsqueeze(-1) * value,\n            strengths[0] if",
           CONTRACT, "equation"),
    Mutant("write-only erases", LAYERS, "strengths[-1] if self.erase else None", "strengths[-1]",
           CONTRACT, "equation"),
    Mutant("context not normalised", REFERENCE,
           "context = rms_norm(x_in, norm_weight.to(dtype), norm_eps)", "context = x_in",
           CONTRACT, "equation"),
    Mutant("read rounded to bf16 before its norm", REFERENCE,
           "x_in = compress(new, kernel, segments)\n",
           "x_in = compress(new, kernel, segments).bfloat16()\n", MODEL, "state_dtype"),
    Mutant("compressor not shared in a block", BUILD,
           "owns = index == 0 or not config.share_compressor", "owns = True", CONFIG,
           "adds_the_parameters"),
    Mutant("norm's weight read outside its module", LAYERS, "self.norm(None)", "self.norm.weight",
           CONTRACT, "inside_its_own"),
    Mutant("unknown keywords swallowed", INPUTS, "if name not in FOR_ATTENTION and name not in",
           "if not name and name not in", CALLS, "nobody_sends"),
    Mutant("positions count padding", INPUTS, "positions = positions_from_mask(mask, own)",
           "positions = own.unsqueeze(0)", CALLS, "come_from_the_mask"),
    Mutant("chunk of one token takes padding for text", INPUTS,
           "return None if not is_traced() and bool(tokens.all())",
           "return None if len(own) == 1",
           CALLS, "come_from_the_mask"),
    Mutant("documents of a mask not verified", INPUTS, "if not bool(found.agrees):",
           "if False:", CALLS,
           "cannot_follow"),
    Mutant("histories not selected with their sequences", CACHE,
           "self.conv_states[slot] = history[indices.to(history.device)]", "pass", DECODING,
           "selected"),
    Mutant("unused histories left empty", CACHE,
           "if not cache.has_previous_state(layer, slot):", "if False:", DECODING, "cropped"),
    Mutant("two reads share one history", BUILD, '"slot": (layer, index)', '"slot": (layer, 0)',
           DECODING, "cached_chunks"),
    Mutant("padding not masked in convolutions", SHARED, "if self.mask is not None:", "if False:",
           DECODING, "left_padding"),
    Mutant("labels not shifted", MODELING, "logits=logits, labels=labels,",
           "logits=logits, labels=labels, shift_labels=labels,", MODEL, "next_token"),
    Mutant("num_items_in_batch ignored", MODELING, "vocab_size=self.config.vocab_size, **kwargs",
           "vocab_size=self.config.vocab_size", MODEL, "num_items"),
    Mutant("gate's bias starts at 0", SHARED, "return math.log(share) - math.log1p(-share)",
           "return 0.0", START, "starts_at_its_value"),
    Mutant("residual draws the backbone's random numbers", BUILD,
           "with torch.random.fork_rng(devices=[]):", "if True:", START, "backbone"),
    Mutant("channels written alike", SHARED, "0.5 * noise", "0.0 * noise", START,
           "additive and equal_in_training"),
    Mutant("folded channel kernel off by one", COMPRESS, "output + tap - left",
           "output + tap - left + 1", PUBLISHED, "folded"),
    Mutant("queries and keys normalised before RoPE", MODELING,
           '"after_rope": AttentionNormAfterRope', '"after_rope": Qwen3Attention', PUBLISHED,
           "published_option"),
    Mutant("kernel without the erase term", FORWARD, "entry -= strength[0] * readout",
           "entry -= 0.0 * readout", FUSED, "settled_write"),
    Mutant("kernel drops the gradient through the readout", GRADIENTS,
           "kept + (grad[j] + key * d_readout[j],)", "kept + (grad[j],)", FUSED, "settled_write"),
    Mutant("kernel drops the gradient through the length", GRADIENTS,
           "d_key -= (scale * key) * (scale * scale * d_scale)", "d_key -= 0.0", FUSED,
           "settled_write"),
    Mutant("kernel's compressor sees another document", FORWARD,
           "tl.where(start, 0.0, carried[s])", "carried[s]", FUSED, "no_other_document"),
    Mutant("pull of the norm has the wrong sign", BACKWARD, "missing = -pull * x_in",
           "missing = pull * x_in", FUSED, "one_token"),
    Mutant("the same for a wide state", WIDE, "dx_in -= pull * x_in", "dx_in += pull * x_in",
           WIDE_TESTS, "read_is_the_reference"),
    Mutant("weights of a wide state miss the pull", WIDE, "dx_in -= tl.load(pulls + token) * x_in",
           "dx_in -= 0.0 * x_in", WIDE_TESTS, "read_is_the_reference"),
    Mutant("biases of a wide state get no gradient", WIDE,
           "store_numbers(own + rows * D, biases, p == 0)",
           "store_numbers(own + rows * D, zero_numbers(logits), p == 0)", WIDE_TESTS,
           "read_is_the_reference"),
    Mutant("the same in the first of two passes", BACKWARD, "base - source * pull",
           "base + source * pull", FUSED, "one_token"),
    Mutant("state not rounded between two writes", TILES, ".to(DTYPE).to(tl.float32)", "",
           MEMORY, "rebuilt_states and float16"),
    Mutant("kernel forgets the value's bias", FORWARD, "logit += value_shift[j]", "logit += 0.0",
           FUSED, "logits"),
    Mutant("gradient of a bias counts the last token only", BACKWARD,
           "if logits > 0:\n            biases = accumulate(biases, d_logits)",
           "if logits > 0:\n            biases = d_logits", MEMORY, "divide_among_programs"),
    Mutant("rebuilt state misses its first write", TILES, "for i in tl.static_range(len(keys)):",
           "for i in tl.static_range(1, len(keys)):", MEMORY, "never_read"),
    Mutant("direction from a state that nobody stored", LAYERS,
           "rebuild=0 if store else", "rebuild=", FUSED_MODEL, "mlp-direction"),
    Mutant("checkpointed block starts from a state that nobody stored", MODELING,
           "state = state.stored(self.config.backend)", "state = state._replace(trail=None)",
           FUSED_MODEL, "checkpointing"),
    Mutant("program begins one token late for its compressor", FORWARD, "first - halo,",
           "first - halo + 1,", MEMORY, "shorter_than_a_compressor"),
    Mutant("gradients of the taps in the wrong order", BACKWARD,
           "at = (K - 1 - q // DV) * DV + q % DV", "at = q", FUSED, "no_other_document"),
    Mutant("kept numbers of a read without a write are not written", FORWARD,
           "readouts = readouts if h is not None else zero_numbers(DV)\n", "", MEMORY,
           "written_whole"),
    Mutant("last program is not started", FUSED_LAUNCH, "return (-(-tokens // chunk),), arguments",
           "return (max(tokens // chunk, 1),), arguments", MEMORY, "divide_among_programs"),
    Mutant("program leaves out its last token", BACKWARD,
           "end = tl.minimum(first + chunk, tokens)\n    halo",
           "end = tl.minimum(first + tl.maximum(chunk - 1, 1), tokens)\n    halo", MEMORY,
           "divide_among_programs"),
    Mutant("documents' first tokens found one late", LAUNCH,
           "starts[:, 1:] = segments[:, 1:] != segments[:, :-1]",
           "starts[:, 2:] = segments[:, 1:-1] != segments[:, :-2]", FUSED, "no_other_document"),
    Mutant("embedding kernel sees another document", EMBEDDING, "tl.where(start, 0.0, window[s])",
           "window[s]", FUSED, "embedding_convolution"),
    Mutant("triton by name falls back silently", DISPATCH, 'if reason and backend == "triton":',
           "if False:", BACKENDS),
    Mutant("target does not grow with the width", BUILD,
           "target_scale=math.sqrt(config.width_ratio)", "target_scale=1.0", SCALING, "target"),
    Mutant("gate and target start like matrices", BUILD,
           "return matrix_std(config) / math.sqrt(config.width_ratio)", "return matrix_std(config)",
           SCALING, "starts"),
    Mutant("compressors shrink with the width", BUILD,
           "return matrix_std(config) * math.sqrt(config.width_ratio)", "return matrix_std(config)",
           SCALING, "starts"),
    Mutant("logits do not shrink with the width", CONFIGURATION,
           "return self.logit_multiplier / self.width_ratio", "return self.logit_multiplier",
           SCALING, "logits"),
    Mutant("gate and target learn at the full rate", GROUPS, "for name in module.reads_width}",
           "for name in ()}", SCALING, "more_slowly"),
    Mutant("embeddings learn more slowly", GROUPS, " and parameter is not embeddings", "", SCALING,
           "more_slowly"),
]  # fmt: skip


def run_tests(folder: Path, *arguments: str) -> tuple[int, str]:
    """pytest's exit status and output in a copy; 1 is "a test failed", nothing else is."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "guard", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env=environment,
            timeout=TIMEOUT,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer in {TIMEOUT} s"
    return done.returncode, done.stdout + done.stderr


def copy_package(folder: Path) -> None:
    """What the tests of the lower floors need, and a guard that they import this copy."""
    skip = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(REPO / "deep_delta", folder / "deep_delta", ignore=skip)
    for name in ("ops", "residual", "model"):
        shutil.copytree(REPO / "tests" / name, folder / "tests" / name, ignore=skip)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/helpers.py", "tests/fused_cases.py"):
        shutil.copy(REPO / name, folder / name)
    (folder / "guard.py").write_text(GUARD, encoding="utf-8")


def check(mutant: Mutant) -> tuple[bool, str]:
    """Whether the bug was caught, and by what, or why it is not known."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_package(folder)
        file = folder / "deep_delta" / mutant.file
        code = file.read_text(encoding="utf-8")
        if (count := code.count(mutant.old)) != 1:
            return False, f"NO MATCH: found {count} times in {mutant.file}: {mutant.old!r}"
        file.write_text(code.replace(mutant.old, mutant.new), encoding="utf-8")
        select = ["-k", mutant.select] if mutant.select else []
        status, output = run_tests(folder, "-x", mutant.tests, *select)
    if status == 0:
        return False, "SURVIVED"
    failed = re.search(r"^FAILED \S+/(\w+\.py::.+?)( - |$)", output, re.MULTILINE)
    if status != 1 or failed is None:
        return False, f"NOT RUN (pytest says {status}): {' '.join(output.split())[-200:]}"
    return True, failed[1]


def check_without_bug(whole_files: bool) -> str:
    """The output of the tests above if they are red already: then their red means nothing."""
    whole = {mutant.tests for mutant in MUTANTS if not mutant.select}
    rest = [mutant for mutant in MUTANTS if mutant.tests not in whole]
    arguments = sorted(whole)
    if not whole_files:
        chosen = {f"({mutant.select})" for mutant in rest}
        arguments = [*sorted({mutant.tests for mutant in rest}), "-k", " or ".join(chosen)]
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_package(Path(name))
        status, output = run_tests(Path(name), *arguments)
    return "" if status == 0 else output


def main() -> int:
    started, caught = time.monotonic(), 0
    width = max(len(mutant.bug) for mutant in MUTANTS)
    with ThreadPoolExecutor(max_workers=2) as pool:
        if red := "".join(pool.map(check_without_bug, (True, False))):
            print(f"The tests are red without any bug:\n{red[-3000:]}")
            return 1
        print(f"{'bug':{width}}  killed by")
        for mutant, (killed, by) in zip(MUTANTS, pool.map(check, MUTANTS), strict=True):
            caught += killed
            print(f"{mutant.bug:{width}}  {by}", flush=True)
    print(f"{caught} of {len(MUTANTS)} bugs caught in {time.monotonic() - started:.0f} s")
    return 0 if caught == len(MUTANTS) else 1


if __name__ == "__main__":
    sys.exit(main())
