"""Meta's older position embedding becomes the one that is added: half a patch up and left, class token last."""

import numpy as np
import pytest

from llama4_jax.checkpoint import assembly, positions


def test_each_patch_gets_the_mean_of_four_neighbours_and_the_class_token_moves_to_the_end():
    old = np.array([[9], [4], [8], [12], [16]], np.float32)  # class token, then a grid of 4 8 over 12 16
    assert positions.resample(old)[:, 0].tolist() == [1, 3, 4, 10, 9]


def test_a_reader_offers_the_new_name_and_leaves_the_rest_alone():
    old = np.arange(10, dtype=np.float32).reshape(5, 2)
    stored = assembly.InMemory({positions.OLD: old, "norm.weight": old[0]})
    reader = positions.Resampled(stored)
    assert (
        reader.shapes == {positions.NEW: (5, 2), "norm.weight": (2,)} and reader.dtypes.keys() == reader.shapes.keys()
    )
    np.testing.assert_array_equal(reader.read(positions.NEW), positions.resample(old))
    np.testing.assert_array_equal(reader.read(positions.NEW, slice(1, 3)), positions.resample(old)[1:3])
    np.testing.assert_array_equal(reader.read("norm.weight"), old[0])


def test_a_file_with_both_embeddings_keeps_both():
    both = assembly.InMemory({positions.OLD: np.ones((5, 2), np.float32), positions.NEW: np.zeros((5, 2), np.float32)})
    reader = positions.Resampled(both)
    assert set(reader.shapes) == {positions.OLD, positions.NEW}
    assert reader.read(positions.NEW).sum() == 0


def test_an_embedding_of_no_square_grid_is_refused():
    with pytest.raises(ValueError, match=r"wanted \[1 \+ n \* n, d\].*got \[4, 2\]"):
        positions.Resampled(assembly.InMemory({positions.OLD: np.ones((4, 2), np.float32)}))
