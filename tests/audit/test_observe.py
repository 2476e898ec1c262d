"""Writes seen from outside, in every variant; interventions; the self-test."""

import contextlib
import itertools

import pytest
import torch
from helpers import CASES, close, shaken, tiny_config, tiny_model, token_ids
from train.micro import user_error

from deep_delta.audit.auditor import TOLERANCE, Auditor, sequence_losses
from deep_delta.audit.intervene import (
    channel_off,
    erase_off,
    gate_one,
    intervening,
    interventions,
    write_off,
)
from deep_delta.audit.observe import observed, sublayers
from deep_delta.audit.sublayer import REGIMES
from deep_delta.residual import FixedGate

every_case = pytest.mark.parametrize("case", CASES)
PLANTED = {0.0: "skip", 0.5: "contraction", 1.0: "target match", 1.5: "over-relaxed"}


def model_of(case: str, **fields):
    return shaken(tiny_model(case, backend="reference", **fields), 0.1)


def batch_of(batch: int = 3, length: int = 12):
    ids = token_ids(batch, length)
    return {"input_ids": ids, "labels": ids.clone()}


def auditor_of(model) -> Auditor:
    positions = torch.zeros(12, dtype=torch.long), 1
    return Auditor("model", model, positions, (torch.zeros(61, dtype=torch.long), 1))


def writes_of(model, batch):
    """The writes of one pass, and the losses."""
    seen = []
    with observed(model, lambda index, write: seen.append((index, write))):
        losses = sequence_losses(model, batch)
    assert [index for index, _ in seen] == list(range(len(sublayers(model))))
    return [write for _, write in seen], losses


@every_case
def test_every_write_obeys_its_law_and_changes_nothing_by_being_seen(case):
    model, batch = model_of(case), batch_of()
    writes, losses = writes_of(model, batch)
    assert torch.equal(losses, sequence_losses(model, batch))
    for write, following in itertools.pairwise(writes):
        assert torch.equal(write.after, following.before)
    for write in writes:
        assert float(write.fault.max()) < TOLERANCE / 10
        assert (write.gate is not None) == (tiny_config(case).residual == "delta" and
                                            tiny_config(case).erase)  # fmt: skip
        if write.gate is not None and not tiny_config(case).separate_gates:
            target = write.written / write.gate.unsqueeze(-1)
            before, after = target - write.readout, target - write.readout_after
            factor = (1 - write.gate * write.squared_length).abs()
            close(after.norm(dim=-1), factor * before.norm(dim=-1), 1e-5)


def test_losses_are_the_models_own():
    model, batch = model_of("ddl-cc", logit_multiplier=2.0), batch_of()
    loss = model(**batch, use_cache=False).loss
    close(sequence_losses(model, batch).mean().float(), loss, 1e-5)


def test_writes_of_the_fused_kernels_are_the_references():
    """States that nobody stored are rebuilt for the audit."""
    fused = shaken(tiny_model("ddl-cc", backend="triton", rebuild=5), 0.1)
    expected, _ = writes_of(model_of("ddl-cc"), batch_of(1, 4))
    actual, _ = writes_of(fused, batch_of(1, 4))
    for one, other in zip(actual, expected, strict=True):
        close(one.before, other.before, 1e-5)
        close(one.after, other.after, 1e-5)
        close(one.gate, other.gate, 1e-5)


@pytest.mark.parametrize(("gate", "regime"), PLANTED.items())
@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-scalar"])
def test_a_planted_gate_is_in_its_regime(variant, gate, regime):
    auditor = auditor_of(model_of(variant, gate="fixed", gate_init=gate))
    auditor.observe(batch_of())
    for sublayer in auditor.result()["sublayers"]:
        found = {name: entry["mean"] for name, entry in sublayer["gate"]["regimes"].items()}
        assert found == {name: float(name == regime) for name in REGIMES}
        before, after = (sublayer["discrepancy"][name]["mean"] for name in ("before", "after"))
        if gate == 0:  # β = 0 writes nothing, and its target is not known
            assert (before, after, sublayer["changed"]["mean"]) == (None, None, 0)
        else:
            assert after == pytest.approx(abs(1 - gate) * before, abs=1e-5)


@pytest.mark.parametrize("variant", ["additive", "additive-expanded", "write-only-cc"])
def test_what_a_model_does_not_have_is_absent(variant):
    auditor = auditor_of(model_of(variant))
    batch = batch_of()
    auditor.intervene(batch, auditor.observe(batch), lambda: None)
    result = auditor.result()
    for sublayer in result["sublayers"]:
        assert sublayer["gate"] is sublayer["discrepancy"] is sublayer["erased"] is None
        assert sublayer["written"]["mean"] > 0
        assert (sublayer["channels"] is None) == (variant == "additive")
        assert (sublayer["compressor"] is None) == (variant == "additive")
    names = {effect["name"] for effect in result["interventions"]}
    assert names == ({"write off"} if variant == "additive" else {"write off", "channel off"})


def test_tokens_are_binned_by_position_and_id():
    model, batch = model_of("ddl-cc"), batch_of()
    ids, positions = batch["input_ids"], torch.arange(12).expand(3, 12)
    auditor = Auditor("model", model, (torch.arange(12) // 8, 2), (torch.arange(61) % 3, 3))
    auditor.observe(batch)
    gates = [write.gate for write in writes_of(model, batch)[0]]
    for sublayer, gate in zip(auditor.result()["sublayers"], gates, strict=True):
        for key, bins in (("by_position", positions // 8), ("by_frequency", ids % 3)):
            for index, entry in enumerate(sublayer["gate"][key]):
                assert entry["n"] == (bins == index).sum()
                assert entry["mean"] == pytest.approx(float(gate[bins == index].mean()))


def test_effects_are_the_changed_losses_less_the_models_own():
    model, batch = model_of("ddl-cc"), batch_of()
    auditor, passes = auditor_of(model), []
    losses = auditor.observe(batch)
    auditor.intervene(batch, losses, lambda: passes.append(1))
    assert len(passes) == len(auditor.interventions()) == 4 * (3 + 4)
    for (index, name, channel), means in auditor.effects.items():
        change = {"write off": write_off, "erase off": erase_off, "gate at 1": gate_one}.get(name)
        with intervening(sublayers(model)[index].residual, change or channel_off(channel - 1)):
            changed = sequence_losses(model, batch)
        assert means.entry()["mean"] == pytest.approx(float((changed - losses).mean()), abs=1e-12)


def test_a_write_that_is_not_applied_stops_the_audit():
    """The next read applies another β than the one the audit saw."""
    model = model_of("ddl-cc")
    auditor, residual = auditor_of(model), sublayers(model)[1].residual

    @contextlib.contextmanager
    def spoiled(*arguments):
        with (
            observed(*arguments),
            intervening(residual, lambda state: state._replace(erase=1.01 * state.erase)),
        ):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deep_delta.audit.auditor.observed", spoiled)
        line = user_error(auditor.observe, batch_of())
    assert "self-test failed in layer 1 MLP" in line
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    assert "self-test failed in layer 1 attention" in user_error(auditor.observe, batch_of())


@every_case
def test_an_intervention_that_changes_nothing_changes_no_loss(case):
    model, batch = model_of(case), batch_of()
    with intervening(sublayers(model)[2].residual, lambda state: state):
        changed = sequence_losses(model, batch)
    assert torch.equal(changed, sequence_losses(model, batch))


@pytest.mark.parametrize("case", ["ddl-cc", "ddl-tc", "ddl-scalar", "separate-gates"])
def test_erase_off_is_the_write_only_residual(case):
    model, batch = model_of(case), batch_of()
    residual = sublayers(model)[1].residual
    with intervening(residual, erase_off):
        changed = sequence_losses(model, batch)
    assert not torch.equal(changed, sequence_losses(model, batch))
    residual.erase = False
    close(changed, sequence_losses(model, batch), 1e-6)


@pytest.mark.parametrize("case", ["ddl-cc", "ddl-scalar"])
def test_gate_at_one_is_a_gate_fixed_at_one(case):
    model, batch = model_of(case), batch_of()
    residual = sublayers(model)[2].residual
    with intervening(residual, gate_one):
        changed = sequence_losses(model, batch)
        writes, _ = writes_of(model, batch)
    residual.gate = FixedGate(1.0)
    close(changed, sequence_losses(model, batch), 1e-5)
    close(writes[2].readout_after, writes[2].written, 1e-4)  # the readout is the target


@pytest.mark.parametrize("case", ["additive", "additive-expanded", "write-only-cc", "ddl-tc"])
def test_write_off_leaves_the_state(case):
    model, batch = model_of(case), batch_of()
    with intervening(sublayers(model)[1].residual, write_off):
        writes, changed = writes_of(model, batch)
    assert torch.equal(writes[1].before, writes[1].after)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()  # h = 0
    close(changed, sequence_losses(model, batch), 1e-6)


@pytest.mark.parametrize("case", ["additive-expanded", "write-only-cc", "ddl-cc", "large-epsilon"])
def test_channel_off_leaves_one_channel_and_writes_the_others(case):
    model, batch = model_of(case), batch_of()
    plain, _ = writes_of(model, batch)
    with intervening(sublayers(model)[0].residual, channel_off(0)):
        writes, _ = writes_of(model, batch)
    close(writes[0].after[:, :, 0], writes[0].before[:, :, 0], 1e-6)
    assert not torch.equal(plain[0].after[:, :, 0], plain[0].before[:, :, 0])
    assert torch.equal(writes[0].after[:, :, 1:], plain[0].after[:, :, 1:])


def test_only_what_means_something_is_switched_off():
    assert [one.name for one in interventions(False, 1)] == ["write off"]
    assert [one.name for one in interventions(True, 1)] == ["write off", "erase off", "gate at 1"]
    assert [one.channel for one in interventions(False, 3)] == [None, 1, 2, 3]


def test_memory_does_not_grow_with_text():
    auditor = auditor_of(model_of("ddl-cc"))

    def numbers(thing) -> int:
        if isinstance(thing, torch.Tensor):
            return thing.numel()
        parts = thing.values() if isinstance(thing, dict) else getattr(thing, "__dict__", {})
        parts = parts.values() if hasattr(parts, "values") else parts
        return sum(numbers(part) for part in parts)

    sizes = []
    for _ in range(3):
        auditor.intervene(batch_of(), auditor.observe(batch_of()), lambda: None)
        sizes.append(
            sum(map(numbers, auditor.statistics))
            + numbers(auditor.effects) + numbers(auditor.overlaps) + numbers(auditor.loss)
        )  # fmt: skip
    assert sizes[0] == sizes[1] == sizes[2] > 1000
