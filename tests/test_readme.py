"""The README's Python and its `ddl` lines work: run in order, shrunk, in a folder of their own."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import REPO
from train.micro import some_text

import deep_delta_cli
from deep_delta import DeepDeltaConfig

# Appended, and of two equal options the last one counts: the same commands, smaller.
SHRINK = shlex.split(
    "--size tiny --steps 2 --warmup_steps 1 --eval_every 2 --log_every 1 --eval_sequences 4 "
    "--batch_size 4 --seq_len 32 --model.num_hidden_layers 1"
)


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the README's fenced Python and shell blocks, in order."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```(python|sh)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


def ddl_lines(block: str) -> list[list[str]]:
    """The words of a shell block's `ddl` commands; a backslash at a line's end joins two lines."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[:1] == ["ddl"]]


def make_inputs(words: list[str]) -> None:
    """What `ddl prepare` shall read, if it is not there: a folder with one document a file."""
    for name in words[1 : words.index("--out")]:
        folder = Path(name)
        assert not folder.suffix, f"the README prepares {name}: teach this test to write it"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(200):
            (folder / f"{number}.txt").write_text(some_text(80, number), encoding="utf-8")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A current folder as a reader has it, where every preset is tiny."""
    monkeypatch.chdir(tmp_path)
    from_preset = DeepDeltaConfig.from_preset
    monkeypatch.setattr(
        DeepDeltaConfig,
        "from_preset",
        lambda variant, size="small", **fields: from_preset(variant, "tiny", **fields),
    )


def test_the_readme_has_something_to_run():
    texts = blocks()
    python = "".join(text for language, text in texts if language == "python")
    commands = [
        words[0] for language, text in texts if language == "sh" for words in ddl_lines(text)
    ]
    assert "import" in python
    assert {"prepare", "train", "compare", "eval"} <= set(commands)


@pytest.mark.slow
def test_the_readme_runs(reader, capsys):
    names: dict[str, object] = {}  # a later block may use what an earlier one defined
    for number, (language, text) in enumerate(blocks(), start=1):
        if language == "python":
            exec(compile(text, f"README.md, block {number}", "exec"), names)
            continue
        for words in ddl_lines(text):
            if words[0] == "prepare":
                make_inputs(words)
            shrink = {"prepare": [], "eval": ["--limit", "5"]}.get(words[0], SHRINK)
            assert deep_delta_cli.main([*words, *shrink]) == 0, capsys.readouterr().err
