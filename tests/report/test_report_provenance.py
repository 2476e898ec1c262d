"""What a report says of how it was made."""

import subprocess

import torch

from deep_delta.report import provenance


def test_commit(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.delenv("DDL_COMMIT", raising=False)
    assert provenance.commit() is None
    (tmp_path / "deep_delta").mkdir()
    (tmp_path / "deep_delta" / "new.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    clean = provenance.commit()
    assert len(clean) == 12
    (tmp_path / "results.csv").write_text("")
    assert provenance.commit() == clean, "results themselves do not make the source dirty"
    (tmp_path / "deep_delta" / "other.py").write_text("")
    assert provenance.commit() == f"{clean}-dirty"
    monkeypatch.setenv("DDL_COMMIT", "abc")  # where a copy lies in an older checkout
    assert provenance.commit() == "abc"


def test_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance.hardware() == provenance.hardware(2)  # processes share the one CPU
    assert provenance.hardware().startswith("CPU (")
    assert provenance.hardware().endswith(f"), {torch.get_num_threads()} threads")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert provenance.hardware() == "NVIDIA H100"
    assert provenance.hardware(2) == "2 × NVIDIA H100"
