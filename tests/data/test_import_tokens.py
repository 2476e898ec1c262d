"""scripts/import_tokens.py: data folders from files of ids."""

import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deep_delta.data import TokenShards, check_tokenizer
from deep_delta.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["A word, another word.", "Ünïcode: € 5", "third"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "import_tokens.py"
    command = [sys.executable, script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture
def given(tmp_path) -> tuple[Path, Path, Path]:
    """The files of two splits, one compressed, and the folder of their tokenizer."""
    tokenizer = load_tokenizer(None)
    tokenizer.save(tmp_path)
    ids = np.concatenate(tokenizer.encode(TEXTS))
    train, val = tmp_path / "train.bin", tmp_path / "val.uint16.xz"
    train.write_bytes(ids.tobytes())
    val.write_bytes(lzma.compress(ids[:8].tobytes()))
    return train, val, tmp_path


@pytest.mark.slow
def test_folder_holds_the_ids_and_counts_their_text(given, tmp_path):
    train, val, tokenizer = given
    done = run(train, val, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    shards = TokenShards.open(tmp_path / "out", "train")
    check_tokenizer(shards.manifest, shards.manifest.vocab_size)
    assert shards.tokens(0, len(shards)).tolist() == np.fromfile(train, "<u2").tolist()
    split = shards.manifest.splits["train"]
    assert split.documents == len(TEXTS)
    assert split.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards.manifest.splits["val"].tokens == 8


@pytest.mark.parametrize("fault", ["folder exists", "odd bytes", "unknown id", "no file"])
@pytest.mark.slow
def test_bad_input_is_one_line(fault, given, tmp_path):
    train, val, tokenizer = given
    out = tmp_path if fault == "folder exists" else tmp_path / "out"
    if fault == "odd bytes":
        train.write_bytes(b"abc")
    elif fault == "unknown id":
        train.write_bytes(np.array([60_000], "<u2").tobytes())
    elif fault == "no file":
        train.unlink()
    done = run(train, val, "--tokenizer", tokenizer, "--out", out)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
