"""`ddl audit` from a checkpoint to its page, and what it refuses."""

import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from report.browser import SCHEMES, check_page, needs_chromium
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from train.micro import user_error

import deep_delta_cli
from deep_delta.audit import audit
from deep_delta.audit.inputs import frequency_bins, load, position_bins, trained_on
from deep_delta.data import PackedSequences, TokenShards
from deep_delta.model import DeepDeltaForCausalLM
from deep_delta.report.audit_lines import colour_of
from deep_delta.report.style import variant_style

CONTEXT = {"command": "ddl audit x", "commit": "0123", "device": "CPU"}
SMALL = {"sequences": 5, "seq_len": 16, "batch_size": 2, "context": CONTEXT}


@pytest.fixture
def run(text, tmp_path):
    def run(*checkpoints, **options):
        options = {"data": str(text), **SMALL, **options}
        return audit(list(checkpoints), tmp_path / "out", **options)

    return run


@pytest.fixture
def no_page(monkeypatch):
    """Draw nothing, where only numbers are asked for."""
    monkeypatch.setattr("deep_delta.audit.run.write_audit", lambda summary, out: None)


class Page(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask about."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.drawings, self.text = [], [], [], ""
        self.links: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("href", "src") and not v.startswith("#")]
        if tag == "svg":
            self.drawings.append(found)
        if tag != "meta" and tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder) -> Page:
    return Page((folder / "audit.html").read_text(encoding="utf-8"))


@needs_chromium
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.slow
def test_the_page_in_a_browser(run, checkpoint, tmp_path, scheme):
    run(checkpoint("ddl-cc"), checkpoint("additive"))
    plots = list((tmp_path / "out").glob("*.png"))
    assert len(plots) == len(list((tmp_path / "out").glob("*.svg"))) > 5
    check_page(tmp_path / "out" / "audit.html", len(plots), scheme)


@pytest.mark.slow
def test_two_checkpoints_from_files_to_page(run, checkpoint, tmp_path):
    paths = checkpoint("ddl-cc"), checkpoint("additive")
    summary = run(*paths)
    out = tmp_path / "out"
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(summary))
    first, second = summary["checkpoints"]
    assert (first["name"], second["name"]) == ("ddl-cc", "additive")
    assert summary["data"]["tokens"] == 5 * 16
    gap = second["loss"]["mean"] - first["loss"]["mean"]
    assert summary["loss_difference"]["mean"] == pytest.approx(gap)
    assert summary["loss_difference"]["n"] == 5
    names = [(e["layer"], e["kind"], e["name"], e["channel"]) for e in first["interventions"]]
    assert len(names) == len(set(names)) == 4 * (3 + 4)

    page = page_of(out)
    assert page.links == []  # self-contained
    assert len(page.ids) == len(set(page.ids))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.drawings)
    described = {drawing["aria-describedby"] for drawing in page.drawings}
    assert described <= set(page.ids)
    names = {re.sub("-description$", "", name) for name in described}
    assert {path.stem for path in out.glob("*.png")} == names
    assert {"gate-1", "regimes-1", "erase-off", "overlap-1", "overlap-2", "state-size"} <= names
    assert "gate-2" not in names  # the additive model has none
    assert "additive erases nothing" in page.text
    ranks = [sublayer["channels"]["effective_rank"] for sublayer in first["sublayers"]]
    said = f"of 4 value channels X uses {min(ranks):.2f} to {max(ranks):.2f}"
    assert said in page.text
    growth = (out / "state-size.svg").read_text()
    assert all(variant_style(name).colour in growth for name in ("ddl-cc", "additive"))
    assert "Self-test passed" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


@pytest.mark.parametrize("variant", ["additive-expanded", "write-only-scalar", "ddl-tc"])
@pytest.mark.slow
def test_one_checkpoint_of_any_kind(run, checkpoint, tmp_path, variant):
    run(checkpoint(variant))
    page = page_of(tmp_path / "out")
    assert ("Gate by position" in page.text) == (variant == "ddl-tc")
    assert ("Value channels" in page.text) == (variant != "write-only-scalar")
    assert ("t−3" in page.text) == (variant == "ddl-tc")
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_numbers_do_not_depend_on_the_batch(run, no_page, checkpoint):
    path = checkpoint("ddl-cc")

    def same(one, other):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                same(one[key], other[key])
        elif isinstance(one, list):
            for a, b in zip(one, other, strict=True):
                same(a, b)
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)

    one, other = (run(path, batch_size=size)["checkpoints"][0] for size in (1, 5))
    for result in (one, other):
        for sublayer in result["sublayers"]:
            del sublayer["gate"]["histogram"]  # rounding may move a token over a border
    same(one, other)


def test_sequences_are_spread_evenly_over_the_split(run, no_page, checkpoint, text):
    path = checkpoint("ddl-scalar")
    summary = run(path, sequences=3)
    packed = PackedSequences(TokenShards.open(text, "val"), 16)
    total = summary["data"]["of_sequences"]
    assert total == len(packed) > 9
    ids = torch.stack([packed[i]["input_ids"] for i in (0, total // 3, 2 * total // 3)])
    model = DeepDeltaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert summary["checkpoints"][0]["loss"]["mean"] == pytest.approx(float(loss), abs=1e-5)
    assert run(path, sequences=10**6)["data"]["sequences"] == total


def test_two_of_one_variant_are_numbered(run, no_page, checkpoint):
    path = checkpoint("ddl-scalar")
    summary = run(path, path)
    assert [one["name"] for one in summary["checkpoints"]] == ["ddl-scalar (1)", "ddl-scalar (2)"]
    assert summary["loss_difference"]["mean"] == 0
    first, second = (colour_of(summary, number, "MLP") for number in (0, 1))
    assert first == variant_style("ddl-scalar").colour != second


def test_the_sublayers_of_one_checkpoint_have_two_colours(run, no_page, checkpoint):
    summary = run(checkpoint("ddl-scalar"))
    attention, mlp = (colour_of(summary, 0, kind) for kind in ("attention", "MLP"))
    assert attention == variant_style("ddl-scalar").colour != mlp


def test_one_sequence_has_no_interval(run, no_page, checkpoint):
    entry = run(checkpoint("ddl-scalar"), sequences=1)["checkpoints"][0]["loss"]
    assert (entry["n"], entry["low"], entry["high"]) == (1, None, None)
    assert math.isfinite(entry["mean"])


def test_bins_of_positions_and_frequencies(text):
    labels, bins = position_bins(10)
    assert labels == ["0", "1", "2–3", "4–7", "8–9"]
    assert bins.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]
    shards = TokenShards.open(text, "val")
    labels, bins = frequency_bins(shards, 4096)
    ids = torch.from_numpy(shards.tokens(0, len(shards)))
    rate = torch.bincount(ids, minlength=4096) * (1e6 / len(shards))
    edges = [0, 10, 100, 1_000, 10_000, math.inf]
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        assert torch.equal(bins == index, (rate >= low) & (rate < high)), labels[index]


def test_arithmetic_is_the_references_in_fp32_whatever_the_checkpoint_says(checkpoint):
    path = checkpoint("ddl-cc", state_dtype="bfloat16")
    DeepDeltaForCausalLM.from_pretrained(path, dtype="bfloat16").save_pretrained(path)
    model = load(path)
    assert (model.config.backend, model.config.state_dtype) == ("reference", None)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_sequences_are_the_trainings(checkpoint, tmp_path):
    path = checkpoint("ddl-scalar")
    model = DeepDeltaForCausalLM.from_pretrained(path)
    assert trained_on(path, model) == (32, False)
    (tmp_path / "recipe.yaml").write_text("seq_len: 8\nmask_documents: true\n")
    assert trained_on(path, model) == (8, True)
    (tmp_path / "recipe.yaml").write_text("seq_len: [")
    assert "not YAML" in user_error(trained_on, path, model)


def test_documents_that_were_kept_apart_stay_apart(run, no_page, checkpoint, tmp_path):
    path = checkpoint("ddl-tc")
    (tmp_path / "recipe.yaml").write_text("seq_len: 16\nmask_documents: true\n")
    summary = run(path, seq_len=None)
    assert summary["data"]["documents_apart"]
    (tmp_path / "recipe.yaml").unlink()
    assert run(path)["checkpoints"][0]["loss"]["mean"] != summary["checkpoints"][0]["loss"]["mean"]


def without_validation(data, path):
    record = json.loads((data / "manifest.json").read_text())
    record["splits"]["val"]["tokens"] = 0
    (data / "manifest.json").write_text(json.dumps(record))


def another_tokenizer(data, path):
    Tokenizer(models.WordLevel({"one": 0}, "one")).save(str(path / "tokenizer.json"))


def no_weights(data, path):
    (path / "model.safetensors").unlink()


def broken_weights(data, path):
    (path / "model.safetensors").write_bytes(b"no tensors")


def half_the_weights(data, path):
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def another_kind(data, path):
    (path / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (without_validation, 'no tokens in the split "val"'),
        (another_tokenizer, "another tokenizer than the data"),
        (no_weights, "has no weights"),
        (broken_weights, "can't load"),
        (half_the_weights, "lacks 1 of the model's weights, first model.layers.1.mlp.up_"),
        (another_kind, "model type 'gpt2'"),
        (lambda data, path: shutil.rmtree(data), "no such data folder"),
        (lambda data, path: path.rename(path.with_name("final")), "did you mean "),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoint, text, tmp_path, capsys, spoil, expected):
    data = shutil.copytree(text, tmp_path / "data")
    path = checkpoint("additive")
    spoil(data, path)
    if not path.exists():
        path = tmp_path  # a run's folder in place of its final one
    capsys.readouterr()  # what saving the checkpoint printed
    status = deep_delta_cli.main(["audit", str(path), "--data", str(data), "--out", "nowhere"])
    printed = capsys.readouterr().err.splitlines()
    assert (status, len(printed)) == (1, 1), printed
    assert printed[0].startswith("ddl: ")
    assert expected in printed[0]


def test_the_command(checkpoint, text, tmp_path, capsys):
    words = ["audit", str(checkpoint("ddl-scalar")), "--data", str(text), "--sequences", "3"]
    out = tmp_path / "page"
    assert deep_delta_cli.main([*words, "--out", str(out), "--seq-len", "16"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"report: {out / 'audit.html'}"]
    recorded = json.loads((out / "audit.json").read_text())
    assert recorded["torch"] == torch.__version__
    words += ["--out", str(out), "--seq-len", "64"]
    assert deep_delta_cli.main(words) == 1
    assert "takes 32 tokens" in capsys.readouterr().err
