"""What `ddl eval` refuses, in one line; and the loss alone without lm-eval."""

import importlib.util
import json
import shutil

import pytest
from train.micro import some_text

import deep_delta_cli
from deep_delta.data import prepare
from deep_delta.evaluate import run


@pytest.fixture
def refused(capsys):
    def run(*words):
        try:
            status = deep_delta_cli.main(["eval", *map(str, words)])
        except SystemExit as end:
            status = end.code
        lines = capsys.readouterr().err.splitlines()
        assert status
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def rewrite(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "there is no checkpoint folder"),
        (lambda c: (c / "config.json").unlink(), "is no checkpoint, it has no config.json"),
        (lambda c: (c / "config.json").write_text("{"), "is damaged"),
        (lambda c: rewrite(c / "config.json", model_type="llama"), "model type 'llama'"),
        (lambda c: (c / "model.safetensors").unlink(), "has no weights"),
        (lambda c: (c / "model.safetensors").write_bytes(b"12345678"), "can't load"),
        (lambda c: rewrite(c / "config.json", num_hidden_layers=2), "lacks"),
        (lambda c: (c / "tokenizer.json").unlink(), "has no tokenizer.json, which tasks need"),
    ],
)
def test_bad_checkpoints(refused, copy, task_data, damage, expected):
    damage(copy)
    assert expected in refused(copy, "--task-data", task_data, "--tasks", "piqa")
    assert not copy.with_name("copy-eval").exists()


def test_a_run_folder_is_not_its_checkpoint(refused, checkpoint):
    assert f"did you mean {checkpoint}?" in refused(checkpoint.parent)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--tasks arc_esay", "did you mean 'arc_easy'?"),
        ("--tasks piqa,piqa", "repeats"),
        ("--shots 1,1", "repeats"),
        ("--shots x", "'x' is not a whole number"),
        ("--batch-size 0", "whole number from 1"),
        ("--context 49", "lies between 2 and 48"),
        ("--data nowhere", "no such data folder: nowhere"),
        ("--split test", "--split test needs --data"),
        ("--split train --data nowhere", "invalid choice: 'train'"),
        ("--task-data nowhere", "no folder of task files nowhere"),
        ("--task", "'--tasks'"),
    ],
)
def test_bad_words(refused, checkpoint, words, expected):
    assert expected in refused(checkpoint, *words.split())


def test_a_split_that_the_data_lacks(refused, checkpoint, data, tmp_path):
    line = refused(checkpoint, "--data", data, "--split", "test", "--out", tmp_path / "out")
    assert 'no tokens in the split "test", only in "train" and "val"' in line
    assert not (tmp_path / "out").exists()


def test_a_missing_task_file(refused, checkpoint, task_data, tmp_path):
    folder = shutil.copytree(task_data, tmp_path / "tasks")
    (folder / "sciq" / "validation.jsonl").unlink()
    line = refused(checkpoint, "--task-data", folder, "--tasks", "sciq")
    assert "to draw examples from" in line
    (folder / "sciq" / "test.jsonl").unlink()
    assert "has no file" in refused(checkpoint, "--task-data", folder, "--tasks", "sciq")


def test_a_bad_record_is_named(refused, checkpoint, task_data, tmp_path):
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(task_data, tmp_path / "tasks")
    (folder / "piqa" / "validation.jsonl").write_text('{"goal": "a"}\n')
    words = [checkpoint, "--task-data", folder, "--tasks", "piqa", "--out", tmp_path / "out"]
    assert "validation.jsonl, line 1: the record has no 'sol1'" in refused(*words)
    rows = [{"goal": "a", "sol1": "b", "sol2": "c", "label": label} for label in (0, "one")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "piqa" / "validation.jsonl").write_text(text)
    assert f"can't load piqa from {folder}" in refused(*words)


def test_the_loss_needs_no_lm_eval(checkpoint, data, tmp_path, monkeypatch, capsys, refused):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name)
    )
    words = ["eval", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    assert deep_delta_cli.main(words) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"] == []
    line = refused(checkpoint, "--data", data, "--tasks", "all")
    assert "pip install 'deep-delta-learning[eval]'" in line


def test_both_splits_in_one_folder_are_computed_once(checkpoint, tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"text": some_text(20, seed)}) for seed in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "data", val_fraction=0.2, test_fraction=0.3)
    out = tmp_path / "out"
    words = ["eval", str(checkpoint), "--data", str(tmp_path / "data"), "--out", str(out)]
    titles, losses = {}, {}
    for split in ("val", "test", "val", "test"):
        assert deep_delta_cli.main([*words, "--split", split]) == 0
        titles[split] = capsys.readouterr().out.splitlines()[0]
        summary = json.loads((out / "results.json").read_text())
        assert summary["settings"]["split"] == split
        assert losses.setdefault(split, summary["loss"]) == summary["loss"]
        if len(losses) == 2:
            monkeypatch.setattr(run, "text_loss", lambda *_: pytest.fail("computed again"))
    assert titles == {"val": "Validation text", "test": "Test text"}
    assert losses["val"]["documents"] != losses["test"]["documents"]
    assert "Test loss" in (out / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (out / "parts").iterdir()} == {"loss.json", "loss-test.json"}


def test_the_folder_one_stands_in_gets_its_results_beside_it(copy, data, monkeypatch):
    monkeypatch.chdir(copy)
    assert deep_delta_cli.main(["eval", ".", "--data", str(data.resolve())]) == 0
    assert (copy.parent / "copy-eval" / "report.html").is_file()
