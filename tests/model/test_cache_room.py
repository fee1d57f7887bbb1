"""The hybrid cache: what it holds, what it refuses, and decoding rows of different lengths; scan, unrolled and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import Attention, layer_kinds
from llama4_jax.config.train import REMAT
from llama4_jax.model import accounting
from llama4_jax.testing import tiny
from llama4_jax.train import losses

CONFIG = tiny.text_config()  # chunks of 4; two periods of two layers, and one left over
TIME = 11
TOLERANCE = 1e-4  # fp32, logits up to 20; a mistake in mask, slot or position moves them by 1e-2 or more


@pytest.fixture(scope="module")
def model():
    return tiny.model(CONFIG)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.RandomState(0).randint(0, CONFIG.text.vocab_size, (2, TIME)).astype(np.int32)


@jax.jit
def run(model, tokens, segments, cache):
    return model(tokens, segments=segments, cache=cache)


@pytest.mark.parametrize(("length", "chunked"), [(10, 4), (4, 4), (3, 3)])
def test_chunked_layers_hold_one_chunk_and_global_layers_everything(model, length, chunked):
    cache = model.init_cache(2, length)
    kinds = layer_kinds(CONFIG.text)
    wanted = [chunked if kind.attention is Attention.CHUNKED else length for kind in kinds]
    assert [layer.slots for layer in cache.period] == wanted[:2]
    assert [layer.slots for layer in cache.tail] == wanted[4:]
    assert [layer.keys.shape[0] for layer in cache.period] == [2, 2]  # repetitions
    leaves = cache.nbytes - cache.lengths.nbytes
    assert leaves == accounting.cache_bytes(CONFIG, length, batch=2, dtype="float32")
    assert model.init_cache(2, length, jnp.bfloat16).nbytes - cache.lengths.nbytes == leaves // 2


@pytest.mark.parametrize("length", [0, -1, 4097])
def test_a_cache_must_fit_the_context(model, length):
    with pytest.raises(ValueError, match=rf"a cache of {length} tokens .* context_length=4096"):
        model.init_cache(1, length)


def test_tokens_beyond_the_capacity_are_refused_with_the_length_that_would_do(model, tokens):
    cache = model.init_cache(2, TIME).replace(lengths=jnp.array([3, 9]))
    cache.check_room(TIME - 9)
    with pytest.raises(ValueError, match=r"3 tokens after 9 cached ones .* capacity of 11; .*init_cache\(length=12\)"):
        model(tokens[:, :3], cache=cache)


def test_a_cache_of_another_batch_is_refused(model, tokens):
    with pytest.raises(ValueError, match="the cache has 3 rows but tokens have 2"):
        model(tokens, cache=model.init_cache(3, TIME))


def test_misshapen_inputs_are_refused(model, tokens):
    with pytest.raises(ValueError, match=r"tokens must be \[batch time\], got shape \(11,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"segments must have the shape of tokens \(2, 11\), got \(2, 10\)"):
        model(tokens, segments=jnp.ones((2, 10), int))
    with pytest.raises(ValueError, match="positions must have the shape"):
        model(tokens, positions=jnp.ones((1, 11), int))


def test_rows_of_different_lengths_decode_as_if_alone(model, tokens):
    """Prompts of 3 and 6 tokens, left-padded; five steps each, over a border of chunks."""
    lengths, steps = (3, 6), 5
    prompt, segments = np.zeros((2, 2, 6), np.int32)
    for row, length in enumerate(lengths):
        prompt[row, 6 - length :], segments[row, 6 - length :] = tokens[row, :length], 1
    whole = run(model, tokens, np.ones_like(tokens), None).logits
    output = run(model, prompt, segments, model.init_cache(2, TIME))
    np.testing.assert_array_equal(output.cache.lengths, lengths)
    for step in range(steps):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(output.logits[row, -1], whole[row, length - 1 + step], rtol=0, atol=TOLERANCE)
        new = np.array([[tokens[row, length + step]] for row, length in enumerate(lengths)])
        output = run(model, new, np.ones_like(new), output.cache)
    np.testing.assert_array_equal(output.cache.lengths, np.add(lengths, steps))


def test_a_row_that_pauses_keeps_its_cache(model, tokens):
    """A call in which a row has padding alone leaves its keys, values and length as they are."""
    start = run(model, tokens[:, :6], np.ones((2, 6), int), model.init_cache(2, TIME)).cache
    after = run(model, tokens[:, 6:7], np.array([[0], [1]]), start).cache
    np.testing.assert_array_equal(after.lengths, [6, 7])
    for old, new in zip(start.tail + start.period, after.tail + after.period):
        np.testing.assert_array_equal(new.keys[..., 0, :, :, :], old.keys[..., 0, :, :, :])
        assert (new.values[..., 1, :, :, :] != old.values[..., 1, :, :, :]).any()


def test_unrolled_layers_give_the_logits_of_scanned_ones(model, tokens):
    plain = model.unrolled()
    assert len(plain.decoder.period) == 0
    assert len(plain.decoder.tail) == CONFIG.text.num_layers
    assert plain.unrolled() is plain
    segments = np.ones_like(tokens)
    found, wanted = run(plain, tokens, segments, None), run(model, tokens, segments, None)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=TOLERANCE)
    for name, values in wanted.aux.items():  # also in the order of layers
        np.testing.assert_allclose(found.aux[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    assert wanted.aux["load"].shape == (CONFIG.text.num_layers, CONFIG.text.moe.num_experts)


def loss(model, tokens, remat):
    return jnp.mean(jnp.square(model.hidden(tokens, remat=remat).hidden - 1.0))


def test_remat_recomputes_every_layer_and_changes_no_gradient(model, tokens):
    short = tokens[:1, :6]
    wanted, found = (jax.jit(jax.grad(loss), static_argnums=2)(model, short, remat) for remat in (False, True))
    assert len(found.decoder.period) == 2
    assert len(found.decoder.tail) == 1
    for path, leaf in jax.tree.leaves_with_path(found):
        other = dict(jax.tree.leaves_with_path(wanted))[path]
        # Sums in another order: fp32 rounding, relative to the largest gradient of the array.
        tolerance = 1e-4 * float(jnp.abs(other).max()) + 1e-7
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    without, with_remat = (str(jax.make_jaxpr(loss, static_argnums=2)(model, short, remat)) for remat in (False, True))
    # Norms and activations recompute by themselves in both; remat adds each layer of the scan's body and the one left over.
    assert with_remat.count("prevent_cse") - without.count("prevent_cse") == 3


def test_a_policy_is_asked_what_remat_keeps(model, tokens):
    asked = []

    def policy(primitive, *_, **__) -> bool:
        asked.append(primitive.name)
        return False

    jax.eval_shape(jax.grad(lambda model: loss(model, tokens, policy)), model)
    assert "dot_general" in asked


def products(policy, model, tokens) -> int:
    return str(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(model, tokens, policy)).count("dot_general")


def test_each_policy_of_training_computes_fewer_products_again_than_the_one_before(model, tokens):
    """Attention is the plain one at this size, whose output has no name: keeping `attended` saves nothing here."""
    counts = {name: products(losses.rematerialisation(name), model, tokens[:1, :6]) for name in REMAT}
    assert counts["none"] < counts["projections"] < counts["attention"] <= counts["block"]
    assert counts["none"] < counts["shared"] < counts["block"]


def test_what_the_host_keeps_of_a_layer_is_its_input_and_what_the_policy_names(model, tokens):
    policy = losses.rematerialisation("projections", "host")
    steps = str(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(model, tokens[:1, :6], policy))
    layers = 3  # two in the scanned period, and the one left over
    kept = layers * len(("input", "query", "key", "value", "after_attention"))
    assert steps.count("MemorySpace.Host") == kept and steps.count("MemorySpace.Device") == kept


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, kept_in", [*((name, "device") for name in REMAT if name != "none"), ("projections", "host")]
)
def test_no_policy_changes_a_gradient(model, tokens, name, kept_in):
    short = tokens[:1, :6]
    wanted, found = (
        jax.jit(jax.grad(loss), static_argnums=2)(model, short, losses.rematerialisation(*each))
        for each in (("none",), (name, kept_in))
    )
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4 * float(jnp.abs(other).max()) + 1e-7)
