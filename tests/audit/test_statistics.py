"""Every statistic against a case computed by hand."""

import math

import pytest
import torch
from helpers import close, normal

from deep_delta.audit.directions import Overlaps
from deep_delta.audit.observe import write_of
from deep_delta.audit.streams import Histogram, Means, SecondMoments
from deep_delta.audit.sublayer import REGIMES, SublayerStatistics
from deep_delta.residual import State

CPU = torch.device("cpu")


def test_means_by_bin_with_intervals_over_sequences():
    means = Means(bins=2)
    bins = torch.tensor([[0, 0, 1]])
    for values in ([1.0, 3.0, 9.0], [4.0, 4.0, 9.0], [6.0, 6.0, 9.0]):
        means.add(torch.tensor([values]), bins)
    first, second = means.entries()
    # Tokens 1 3 4 4 6 6; sequences 2, 4, 6: mean 4, deviation 2, standard error 2/√3, t₂ = 4.3027.
    assert (first["n"], first["mean"]) == (6, 4.0)
    assert first["spread"] == pytest.approx(math.sqrt(18 / 6))
    assert first["high"] - 4 == pytest.approx(4.3027 * 2 / math.sqrt(3), rel=1e-4)
    assert first["low"] == pytest.approx(8 - first["high"])
    assert (second["n"], second["mean"], second["spread"]) == (3, 9.0, 0.0)


def test_means_leave_out_and_say_what_they_do_not_know():
    means = Means(bins=2)
    values, where = torch.tensor([[2.0, math.nan]]), torch.tensor([[True, False]])
    means.add(values, torch.tensor([[0, 1]]), where)
    known, unknown = means.entries()
    assert (known["n"], known["mean"], known["low"]) == (1, 2.0, None)
    assert (unknown["n"], unknown["mean"], unknown["spread"]) == (0, None, None)


def test_means_do_not_depend_on_batches():
    values, bins = normal(6, 5), torch.arange(5).expand(6, 5) % 2
    whole, parts = Means(bins=2), Means(bins=2)
    whole.add(values, bins)
    for start in (0, 1, 4):
        end = {0: 1, 1: 4, 4: 6}[start]
        parts.add(values[start:end], bins[start:end])
    close(parts.tokens, whole.tokens, 1e-12)
    close(parts.sequences, whole.sequences, 1e-12)


def test_histogram_counts_and_its_quantiles():
    histogram = Histogram(4, 2.0)
    histogram.add(torch.tensor([0.0, 0.4, 0.6, 2.0]))
    assert histogram.counts.tolist() == [2, 1, 0, 1]  # the top belongs to the last bin
    assert histogram.quantile(0.5) == pytest.approx(0.5)
    assert histogram.quantile(0.25) == pytest.approx(0.25)
    assert histogram.quantile(1.0) == pytest.approx(2.0)


def test_effective_rank_is_the_participation_ratio():
    moments = SecondMoments(3)
    assert moments.effective_rank() is None
    moments.add(torch.eye(3, dtype=torch.float64)[:2])
    assert moments.effective_rank() == pytest.approx(2)
    moments.add(torch.tensor([[math.sqrt(2), 0.0, 0.0]], dtype=torch.float64))
    assert moments.effective_rank() == pytest.approx(4**2 / (3**2 + 1))  # eigenvalues 3 and 1


def by_hand() -> SublayerStatistics:
    """Two tokens of d = 2, d_v = 1: β = ½ towards 1 from 3, and β = 1 where the target is met."""
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]]).unsqueeze(0)  # Xᵀ, (1, 2, 1, 2)
    state = State(
        x,
        torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]),  # k = (1, 0) and (0, 1)
        torch.tensor([[[0.5], [2.0]]]),  # a = βv: v = 1 and 2
        torch.tensor([[0.5, 1.0]]),
        0.0,
    )
    write = write_of(state, state.settle("reference"))
    close(write.after, torch.tensor([[[[2.0, 4.0]], [[0.0, 2.0]]]]).double(), 1e-6)
    statistics = SublayerStatistics(2, 1, 2, 1, CPU)
    statistics.add(write, torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    return statistics


def test_a_sublayer_by_hand():
    result = by_hand().result()

    def mean(name: str) -> float:
        return result[name]["mean"]

    assert mean("rms") == pytest.approx((5 + 2) / 2 / math.sqrt(2))
    assert mean("rms_after") == pytest.approx((math.sqrt(20) + 2) / 2 / math.sqrt(2))
    assert mean("written") == pytest.approx((0.5 / 5 + 2 / 2) / 2)
    assert mean("erased") == pytest.approx((1.5 / 5 + 2 / 2) / 2)
    assert mean("changed") == pytest.approx((1 / 5 + 0) / 2)
    assert result["cosine"]["n"] == 1  # the second token's write is none
    assert mean("cosine") == pytest.approx(-3 / 5)
    assert result["direction_rank"] == pytest.approx(2)
    assert result["channels"] is None
    discrepancy = result["discrepancy"]
    assert discrepancy["before"]["mean"] == pytest.approx((2 + 0) / 2)
    assert discrepancy["after"]["mean"] == pytest.approx((1 + 0) / 2)  # |1 − ½| · 2
    assert discrepancy["ratio"]["n"] == 1  # the second token's discrepancy is none
    assert discrepancy["ratio"]["mean"] == pytest.approx(1 / 2)
    gate = result["gate"]
    assert gate["mean"] == pytest.approx(0.75)
    assert [entry["mean"] for entry in gate["by_position"]] == [0.5, 1.0]
    assert [entry["mean"] for entry in gate["by_frequency"]] == [0.75]
    assert {name: gate["regimes"][name]["mean"] for name in REGIMES} == {
        "skip": 0, "contraction": 0.5, "target match": 0.5, "over-relaxed": 0, "saturated": 0,
    }  # fmt: skip
    assert (gate["histogram"][50], gate["histogram"][100], sum(gate["histogram"])) == (1, 1, 2)


@pytest.mark.parametrize(
    ("gate", "regime"),
    [
        (0.0, "skip"), (0.0999, "skip"), (0.1, "contraction"), (0.8999, "contraction"),
        (0.9, "target match"), (1.1, "target match"), (1.1001, "over-relaxed"),
        (1.9, "over-relaxed"), (1.9001, "saturated"), (2.0, "saturated"),
    ],
)  # fmt: skip
def test_every_gate_is_in_one_regime(gate, regime):
    b = torch.tensor([[gate]], dtype=torch.float64)
    state = State(normal(1, 1, 1, 4), normal(1, 1, 4), b.unsqueeze(-1), b, 0.0)
    statistics = SublayerStatistics(4, 1, 1, 1, CPU)
    zero = torch.zeros(1, 1, dtype=torch.long)
    statistics.add(write_of(state, state.settle("reference")), zero, zero)
    regimes = statistics.result()["gate"]["regimes"]
    assert {name for name, entry in regimes.items() if entry["mean"] == 1} == {regime}
    assert sum(entry["mean"] for entry in regimes.values()) == 1


def test_value_channels_by_hand():
    """Channel 1 holds k, and 2k is written into the empty channel 2."""
    k = torch.tensor([0.6, 0.8, 0.0, 0.0]).double()
    x = torch.stack([k, 0 * k]).expand(1, 3, 2, 4)
    a = torch.tensor([0.0, 2.0]).double().expand(1, 3, 2)
    state = State(x, k.expand(1, 3, 4), a, None, 0.0)
    statistics = SublayerStatistics(4, 2, 1, 1, CPU)
    zero = torch.zeros(1, 3, dtype=torch.long)
    statistics.add(write_of(state, state.settle("reference")), zero, zero)
    channels = statistics.result()["channels"]
    assert channels["state_share"] == pytest.approx([1 / 5, 4 / 5])
    assert channels["change_share"] == pytest.approx([0, 1])
    assert channels["effective_rank"] == pytest.approx(1)
    assert torch.tensor(channels["correlation"]).flatten().tolist() == pytest.approx([1] * 4)


def test_overlap_on_the_same_token_and_at_random():
    """Two sublayers that agree on every token, over two directions: ½ by chance, 1 on a token."""
    k = torch.eye(2, dtype=torch.float64).unsqueeze(0)  # token 1 along e₁, token 2 along e₂
    turned = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]]).double() / math.sqrt(2)
    directions = [k, -k, turned]
    overlaps = Overlaps(3, CPU)
    overlaps.add(directions)
    moments = []
    for one in directions:
        moments.append(SecondMoments(2))
        moments[-1].add(one)
    result = overlaps.result(moments)
    expected = torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]]).double()
    close(torch.tensor(result["same_token"]).double(), expected, 1e-7)
    close(torch.tensor(result["other_token"]).double(), torch.full((3, 3), 0.5).double(), 1e-7)
    assert result["chance"] == 0.5


def test_additive_writes_have_a_unit_direction_too():
    x, h = normal(1, 1, 1, 4), 3 * normal(1, 1, 4, seed=1)
    state = State(x, h)
    write = write_of(state, state.settle("reference"))
    close(write.squared_length, torch.ones(1, 1).double(), 1e-12)
    close(write.written, h.norm(dim=-1, keepdim=True), 1e-12)
    assert write.gate is None
    assert float(write.fault) < 1e-12
