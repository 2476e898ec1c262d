"""A run that says nothing for long says what it waits for."""

import time

from train.micro import micro_recipe

from deep_delta.train import train, watch


def test_a_long_step_says_once_what_it_waits_for(
    micro_data, tmp_path, monkeypatch, at_pass, capsys
):
    monkeypatch.setattr(watch, "LONG", 0.3)
    at_pass(4, lambda: time.sleep(1))
    train(micro_recipe(micro_data, tmp_path))
    lines = [line for line in capsys.readouterr().err.splitlines() if "takes over" in line]
    assert lines == [
        "ddl: step 4 takes over 0.3 s; it waits for the forward and backward pass (the first ones "
        "compile)"
    ]


def test_quick_steps_say_nothing(micro_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LONG", 10.0)
    train(micro_recipe(micro_data, tmp_path))
    assert "takes over" not in capsys.readouterr().err
