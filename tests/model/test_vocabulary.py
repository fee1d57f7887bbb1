"""Growing the vocabulary of a model: new rows, old bits, unchanged logits, and checkpoints of the result."""

import dataclasses

import jax
import numpy as np
import pytest

from llama4_jax import checkpoint
from llama4_jax.core import names
from llama4_jax.model import vocabulary
from llama4_jax.testing import tiny

PARTS = [[1, 2], [3, 3, 5], [127]]
TOKENS = np.arange(24)[None] % 120


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.text_config(num_layers=5))


@pytest.fixture(scope="module")
def grown(model):
    return vocabulary.grow(model, vocabulary.mean_of_parts(PARTS))


def test_new_rows_are_the_means_of_their_parts_in_both_matrices(model, grown):
    assert grown.config.text.vocab_size == 131
    for old, new in (
        (model.embed.table[...], grown.embed.table[...]),
        (model.head.kernel[...].T, grown.head.kernel[...].T),
    ):
        old, new = np.asarray(old), np.asarray(new)
        assert new.shape == (131, 32)
        wanted = [(old[1] + old[2]) / 2, (2 * old[3] + old[5]) / 3, old[127]]
        np.testing.assert_allclose(new[128:], wanted, rtol=1e-6, atol=1e-7)


def test_all_old_weights_keep_their_bits(model, grown):
    before, after = names.split(model)[1], names.split(grown)[1]
    assert before.keys() == after.keys()
    for name, array in before.items():
        kept = after[name][tuple(map(slice, array.shape))]
        assert np.array_equal(np.asarray(array).view(np.uint32), np.asarray(kept).view(np.uint32)), name


def test_old_tokens_get_the_logits_they_had_and_a_new_one_the_mean_of_its_parts(model, grown):
    before, after = (jax.jit(lambda m: m(TOKENS).logits)(m) for m in (model, grown))
    tolerance = budget_of_a_product(32) * float(np.abs(before).max())
    np.testing.assert_allclose(after[..., :128], before, rtol=0, atol=tolerance)
    np.testing.assert_allclose(after[..., 128], (before[..., 1] + before[..., 2]) / 2, rtol=0, atol=4 * tolerance)


def budget_of_a_product(length: int) -> float:
    """Relative rounding of a float32 sum of `length` products, whose order may change with the matrix's shape."""
    return length * float(np.finfo(np.float32).eps)


def test_a_new_token_is_read_as_the_mean_of_its_parts(model, grown):
    table = np.asarray(model.embed.table[...])
    np.testing.assert_allclose(grown.embed(np.array([[128]]))[0, 0], (table[1] + table[2]) / 2, rtol=1e-6, atol=1e-7)


def test_weights_keep_their_dtype_and_the_layers_their_stacking(model):
    half = jax.tree.map(lambda array: array.astype("bfloat16"), model)
    grown = vocabulary.grow(half, vocabulary.mean_of_parts(PARTS))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(grown)} == {"bfloat16"}
    assert grown.decoder.periods == model.decoder.periods == 2
    plain = vocabulary.grow(model.unrolled(), vocabulary.mean_of_parts(PARTS))
    assert plain.decoder.periods == 0 and len(plain.decoder.tail) == 5


def test_a_tied_model_grows_its_one_table():
    config = tiny.text_config(num_layers=1)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_embeddings=True))
    grown = vocabulary.grow(tiny.model(config), vocabulary.mean_of_parts(PARTS))
    assert grown.head is None and grown.embed.table.shape == (131, 32)
    logits = grown.unembed(np.ones((1, 32), np.float32))
    np.testing.assert_allclose(logits[0, 128], (logits[0, 1] + logits[0, 2]) / 2, rtol=0, atol=1e-5)


def test_a_grown_model_survives_hugging_face_files(grown, tmp_path):
    checkpoint.save_hf(grown, tmp_path / "hf")
    read = checkpoint.load_hf(tmp_path / "hf")
    assert read.config == grown.config
    assert all(map(np.array_equal, jax.tree.leaves(read), jax.tree.leaves(grown)))


def test_drawn_rows_look_like_the_old_ones_and_come_from_the_seed(model):
    old = np.asarray(model.embed.table[...])
    grow = lambda seed: np.asarray(vocabulary.grow(model, vocabulary.drawn(4000, seed)).embed.table[...])  # noqa: E731
    one, same, other = grow(0)[128:], grow(0)[128:], grow(1)[128:]
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    # Five deviations of the mean, and of the deviation, of 4,000 draws.
    np.testing.assert_allclose(one.mean(0), old.mean(0), atol=5 * old.std(0).max() / 4000**0.5)
    np.testing.assert_allclose(one.std(0), old.std(0), rtol=5 / 8000**0.5)


@pytest.mark.parametrize("wrong", [[], [128], [-1]])
def test_parts_that_the_model_does_not_have_are_refused(model, wrong):
    with pytest.raises(ValueError, match=r"one or more of the 128 ids"):
        vocabulary.grow(model, vocabulary.mean_of_parts([[1], wrong]))
