"""The offsets of the exchange against a loop that puts every single row where it belongs."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.kernels.exchange import Schedule

STORIES = {
    "even": [[2, 2, 2, 2], [2, 2, 2, 2]],
    "all to one expert": [[0, 0, 7, 0], [0, 0, 5, 0]],
    "one device sends nothing": [[0, 0, 0, 0], [3, 0, 1, 4]],
    "nothing at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "one device": [[1, 0, 4]],
}


def one_by_one(counts, capacity):
    """Rounds of (sender, its row) in the order in which each device receives them, padded with None: [r p capacity]."""
    devices, experts = counts.shape
    received = []
    for device in range(devices):
        mine = range(device * experts // devices, (device + 1) * experts // devices)
        received.append(
            [(i, counts[i, :e].sum() + n) for e in mine for i in range(devices) for n in range(counts[i, e])]
        )
    rounds = -(-max(map(len, received)) // capacity)
    padded = [rows + [None] * (rounds * capacity - len(rows)) for rows in received]
    return [[rows[r * capacity : (r + 1) * capacity] for rows in padded] for r in range(rounds)]


def by_parts(counts, capacity):
    """The same out of a schedule."""
    devices, experts = counts.shape
    schedule = Schedule(jnp.asarray(counts, jnp.int32), capacity)
    rounds = []
    for number in range(int(schedule.rounds)):
        parts, buffers = schedule.parts(jnp.int32(number)), [[None] * capacity for _ in range(devices)]
        for i in range(devices):
            for e in range(experts):
                source, size, target = (int(x[i, e]) for x in (parts.source, parts.size, parts.target))
                for n in range(size):
                    assert buffers[e * devices // experts][target + n] is None, "two rows in one place"
                    buffers[e * devices // experts][target + n] = (i, source + n)
        rounds.append(buffers)
    return rounds


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_every_row_goes_to_its_expert_in_order(story, capacity):
    counts = np.array(STORIES[story])
    assert by_parts(counts, capacity) == one_by_one(counts, capacity)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_counts_are_scheduled_as_one_row_after_another(data):
    devices, owned = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=devices**2 * owned, max_size=devices**2 * owned))
    counts, capacity = np.array(counts).reshape(devices, -1), data.draw(st.integers(1, 9))
    assert by_parts(counts, capacity) == one_by_one(counts, capacity)


def test_a_round_is_all_that_an_even_load_takes():
    assert int(Schedule(jnp.full((4, 8), 5, jnp.int32), 40).rounds) == 1
    assert int(Schedule(jnp.full((4, 8), 5, jnp.int32), 39).rounds) == 2
