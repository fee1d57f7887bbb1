"""Image features at their placeholders: in order, in number, and with surplus tiles ignored where numbers are unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.model import fusion
from llama4_jax.testing import tiny

PATCH = 9


def story() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings [2 6 1] of 0; features [3 2 1] numbered 1 to 6; placeholders: two tiles in row 0, one in row 1."""
    tokens = jnp.array([[PATCH, PATCH, 5, PATCH, PATCH, 5], [5, 5, PATCH, 5, PATCH, 5]])
    return jnp.zeros((2, 6, 1)), jnp.arange(1.0, 7.0).reshape(3, 2, 1), tokens == PATCH


def test_features_fill_placeholders_in_order_over_the_flattened_batch():
    embeddings, features, placeholders = story()
    found = fusion.fuse(embeddings - 1, features, placeholders)[..., 0]
    np.testing.assert_array_equal(found, [[1, 2, -1, 3, 4, -1], [-1, -1, 5, -1, 6, -1]])


def test_features_take_the_dtype_of_the_embeddings():
    embeddings, features, placeholders = story()
    assert fusion.fuse(embeddings.astype(jnp.bfloat16), features, placeholders).dtype == jnp.bfloat16


@pytest.mark.parametrize("tiles", [2, 4], ids=["too few", "too many"])
def test_a_mismatch_names_both_numbers(tiles):
    embeddings, _, placeholders = story()
    with pytest.raises(ValueError, match=rf"^6 patch placeholders .* but {2 * tiles} image features"):
        fusion.fuse(embeddings, jnp.zeros((tiles, 2, 1)), placeholders)


def test_surplus_tiles_are_ignored_under_jit():
    embeddings, features, placeholders = story()
    padded = jnp.concatenate([features, jnp.full((2, 2, 1), 99.0)])
    found = jax.jit(fusion.fuse)(embeddings, padded, placeholders)
    np.testing.assert_array_equal(found, fusion.fuse(embeddings, features, placeholders))


@jax.jit
def gradients(embeddings, features, placeholders):
    return jax.grad(lambda *inputs: fusion.fuse(*inputs, placeholders).sum(), argnums=(0, 1))(embeddings, features)


def test_gradients_reach_the_features_used_and_the_embeddings_kept():
    embeddings, features, placeholders = story()
    by_embedding, by_feature = gradients(embeddings, jnp.concatenate([features, jnp.zeros((1, 2, 1))]), placeholders)
    np.testing.assert_array_equal(by_embedding[..., 0], ~placeholders)
    np.testing.assert_array_equal(by_feature[..., 0], [[1, 1]] * 3 + [[0, 0]])


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.vision_config(patch_token=PATCH))


@jax.jit
def run(model, tokens, images):
    return model(tokens, images).logits


def test_tiles_reach_the_tokens_of_their_own_row(model):
    """Two rows with a tile each and a surplus one: what changes in a tile changes its own row alone."""
    tokens = jnp.array([[1, *[PATCH] * 4, 2, 3], [4, 5, *[PATCH] * 4, 6]])
    images = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3), minval=-1, maxval=1)
    logits = run(model, tokens, images)
    for tile, row in ((0, 0), (1, 1)):
        moved = np.abs(run(model, tokens, images.at[tile].multiply(-1.0)) - logits).max(axis=(1, 2))
        assert moved[row] > 1e-2
        assert moved[1 - row] < 1e-5  # experts may find its tokens among others', and round sums in another order
    np.testing.assert_array_equal(run(model, tokens, images.at[2].multiply(-1.0)), logits)


def test_a_tile_of_another_size_is_refused(model):
    with pytest.raises(ValueError, match=r"must be tiles \[n 16 16 3\].* got shape \(1, 20, 16, 3\)"):
        model(jnp.full((1, 4), PATCH), jnp.zeros((1, 20, 16, 3)))
    with pytest.raises(ValueError, match=r"got shape \(16, 16, 3\)"):
        model(jnp.full((1, 4), PATCH), jnp.zeros((16, 16, 3)))


def test_the_model_checks_the_number_of_placeholders(model):
    with pytest.raises(ValueError, match="3 patch placeholders .* 4 image features"):
        model(jnp.full((1, 3), PATCH), jnp.zeros((1, 16, 16, 3)))


def test_a_text_model_refuses_images():
    with pytest.raises(ValueError, match="no vision tower"):
        tiny.model(tiny.text_config(num_layers=2))(jnp.ones((1, 4), int), jnp.zeros((1, 16, 16, 3)))


def test_a_vision_tower_that_computes_layers_again_holds_less_and_has_the_same_gradient():
    tower = tiny.model(tiny.vision_config()).vision
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)), jnp.float32)

    def gradient(remat):
        def total(tower, images):
            return jnp.sum(jnp.sin(tower(images, remat)))

        return jax.jit(jax.grad(total)).lower(tower, images).compile()

    whole, again = gradient(False), gradient(True)
    assert again.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
    for got, want in zip(jax.tree.leaves(again(tower, images)), jax.tree.leaves(whole(tower, images)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
