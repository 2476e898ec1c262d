"""The order of the data: a pure function of seed and step, and no list of it anywhere."""

import time
import tracemalloc

import numpy as np
import pytest
from train.micro import micro_recipe

from deep_delta.data import TokenShards
from deep_delta.train import train
from deep_delta.train.batches import Order


def sequences(order: Order, steps: range) -> list[int]:
    return [number for step in steps for number in order(step)]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 96, 1000])
@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_every_epoch_has_every_sequence_once(count, batch_size):
    """Also where an epoch ends within a batch, or a batch has several epochs."""
    order = Order(count, batch_size, seed=3)
    seen = sequences(order, range(3 * count))
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_steps_seeds_and_epochs_have_orders_of_their_own():
    first, again, other = (sequences(Order(1000, 10, seed), range(200)) for seed in (0, 0, 1))
    assert first == again
    assert first[:1000] != first[1000:]
    assert first[:1000] != other[:1000]
    assert sequences(Order(1000, 10, 0), range(50, 60)) == first[500:600]  # whatever came before
    assert sequences(Order(1000, 20, 0), range(25, 30)) == first[500:600]  # in larger steps


def test_every_order_of_a_few_is_as_likely():
    """Chi-squared of where each of 24 sequences comes, over 1,000 seeds."""
    seeds, count = 1000, 24
    places = np.zeros((count, count))
    for seed in range(seeds):
        places[np.arange(count), Order(count, count, seed)(0)] += 1
    expected = seeds / count
    freedom = (count - 1) ** 2
    assert ((places - expected) ** 2 / expected).sum() / freedom == pytest.approx(1, abs=0.25)


def test_neighbours_are_not_kept_together():
    found = np.array(sequences(Order(100_000, 1000, 0), range(100)), dtype=float)
    assert abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.015
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.015


def test_fifty_billion_tokens_cost_neither_time_nor_memory():
    tracemalloc.start()
    began = time.perf_counter()
    order = Order(50_000_000_000 // 1024, 480, seed=0)
    found = [order(step) for step in (0, 50_000, 101_724)]
    assert time.perf_counter() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len({number for step in found for number in step}) == 3 * 480
    assert max(map(max, found)) > 40_000_000


def test_a_run_sees_that_order_and_skips_none_of_it(micro_data, tmp_path, batches):
    """Also where a batch has the end of one epoch and the start of the next."""
    count = len(TokenShards.open(micro_data, "train")) // 16
    assert count % 36
    train(micro_recipe(micro_data, tmp_path, steps=8, batch_size=36, micro_batch_size=12))
    seen = [ids for batch in batches for ids in batch.tolist()]
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count])
    assert seen[:count] != seen[count : 2 * count]
