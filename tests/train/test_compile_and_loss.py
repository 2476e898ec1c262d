"""The recipe's `compile` and `loss`: every variant the same way, and the run folder as ever."""

import pytest
import torch
from safetensors import safe_open
from train.micro import equal_weights, losses, micro_recipe, user_error

from deep_delta import DeepDeltaForCausalLM
from deep_delta.train import train
from deep_delta.train.loop import Loop


def tensor_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("variant", ["ddl-tc", "additive"])
def test_no_pass_makes_logits(micro_data, tmp_path, variant, monkeypatch):
    made = {True: [], False: []}
    forward = DeepDeltaForCausalLM.forward

    def recorded(self, *arguments, **given):
        out = forward(self, *arguments, **given)
        made[self.training].append(out.logits is not None)
        return out

    monkeypatch.setattr(DeepDeltaForCausalLM, "forward", recorded)
    train(micro_recipe(micro_data, tmp_path, variant=variant))
    assert made == {True: [False] * (1 + 6), False: [False] * 2 * 2}  # with the warm-up pass


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_is_the_run(micro_data, tmp_path, quick_compile, monkeypatch, precision):
    """The same losses and files; and after the warm-up no training step waits for a compiler."""
    # A low rate: what bf16 rounds otherwise in one step must not grow in the next ones.
    fields = {"model": {"num_hidden_layers": 3}, "save_every": 3, "precision": precision}
    fields["lr"] = 5e-4
    plain = micro_recipe(micro_data, tmp_path / "plain", **fields)
    train(plain)
    assert quick_compile() == 0
    in_steps = []
    one_pass = Loop.forward_backward

    def counted(self, *arguments):
        before = quick_compile()
        loss = one_pass(self, *arguments)
        in_steps.append(quick_compile() - before)
        return loss

    monkeypatch.setattr(Loop, "forward_backward", counted)
    recipe = micro_recipe(micro_data, tmp_path / "compiled", compile=True, **fields)
    train(recipe)
    assert in_steps == [0] * 6
    assert quick_compile() == 12  # six of training, six of evaluation
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for row, other in zip(losses(recipe.run_folder), losses(plain.run_folder), strict=True):
        assert row[:2] == other[:2]
        assert row[2] == pytest.approx(other[2], abs=tolerance)
    for name in ("checkpoint-3", "final"):
        assert tensor_names(recipe.run_folder / name) == tensor_names(plain.run_folder / name)


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_by_bit(micro_data, tmp_path, quick_compile, monkeypatch):
    whole = micro_recipe(micro_data, tmp_path / "whole", compile=True)
    train(whole)
    recipe = micro_recipe(micro_data, tmp_path / "crashed", compile=True, save_every=2)
    one_pass, passes = Loop.forward_backward, []

    def crashing(self, *arguments):
        passes.append(1)
        if len(passes) == 4:
            raise RuntimeError("the machine is gone")
        return one_pass(self, *arguments)

    monkeypatch.setattr(Loop, "forward_backward", crashing)
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    train(recipe)
    assert losses(recipe.run_folder) == losses(whole.run_folder)
    equal_weights(recipe.run_folder, whole.run_folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_liger_without_a_gpu_is_one_line_and_leaves_nothing(micro_data, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it, liger runs without a GPU
    recipe = micro_recipe(micro_data, tmp_path, loss="liger")
    assert "'liger'" in user_error(train, recipe)
    assert not recipe.run_folder.exists()
    assert train(micro_recipe(micro_data, tmp_path)).tokens == 6 * 4 * 16
