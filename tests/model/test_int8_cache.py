"""The cache in int8: what it holds, how far that moves logits, and that no call but `init_cache` need know.

How far it may move them is not tuned: rounding to the nearest of evenly spaced numbers errs like noise that is uniform over
one step (Widrow and Kollar, "Quantization Noise", 2008), so logits of a model without a cache, whose keys and values get such
noise, scatter as they may.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama4_jax import checkpoint, infer
from llama4_jax.config import presets
from llama4_jax.core import partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import accounting
from llama4_jax.nn import products
from llama4_jax.nn.attention import CACHED_AS, DecoderAttention
from llama4_jax.plan import programs
from llama4_jax.testing import budget, goldens, tiny

DRAWS = 24
QUICK = {"xla_backend_optimization_level": 0}
TOP_1 = 0.97  # of the golden's tokens; measured 1.0


class NoisyAttention(DecoderAttention):
    """Attention without a cache over keys and values that err as int8 does, by noise from a random `seed`."""

    def __init__(self, attention: DecoderAttention, seed: jax.Array):
        self.config, self.kind, self.norm_eps, self.seed = attention.config, attention.kind, attention.norm_eps, seed
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.output = attention.output

    def _attend(self, query, key, value, context, cache):
        seeds = jax.random.split(self.seed)
        return super()._attend(query, *(noisy(x, seed) for x, seed in zip((key, value), seeds)), context, cache)


def noisy(x: jax.Array, seed: jax.Array) -> jax.Array:
    """x [b t k h] plus noise within half a step, a 254th part of a token's and head's largest number."""
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return x + step * jax.random.uniform(seed, x.shape, minval=-0.5, maxval=0.5)


class Case:
    """A golden of several chunks and its model; step: one cached call on [2 t] tokens."""

    def __init__(self, golden: goldens.Golden):
        self.tokens, self.wanted = golden.arrays["input_ids"].astype(np.int32), golden.arrays["logits"]
        self.model = checkpoint.load_hf(golden.checkpoint)
        self.chunk, self.time = self.model.config.text.attention.chunk_size, self.tokens.shape[1]
        self.step = jax.jit(lambda *call: self.model(call[0], segments=call[1], cache=call[2]), compiler_options=QUICK)
        seeds = jax.random.split(jax.random.key(0), DRAWS)
        drawn = jax.jit(jax.vmap(self.with_noise), compiler_options=QUICK)(seeds)
        self.scatter = np.sqrt(np.mean(np.square(np.asarray(drawn) - self.wanted), axis=0))  # [b t v]

    def with_noise(self, seed):
        plain = self.model.unrolled()
        seeds = iter(jax.random.split(seed, self.model.config.text.num_layers))
        is_attention = lambda node: type(node) is DecoderAttention  # noqa: E731
        swap = lambda node: NoisyAttention(node, next(seeds)) if is_attention(node) else node  # noqa: E731
        return jax.tree.map(swap, plain, is_leaf=is_attention)(self.tokens).logits

    def cached(self, parts: list[np.ndarray], cache=None):
        """Logits row by row, and the cache: one call with a row of its own length each, left-padded."""
        tokens, segments = np.zeros((2, *self.tokens.shape), np.int32)
        for row, part in enumerate(parts):
            tokens[row, self.time - len(part) :], segments[row, self.time - len(part) :] = part, 1
        cache = self.model.init_cache(2, self.time, "int8") if cache is None else cache
        output = self.step(tokens, segments, cache)
        return [np.asarray(row)[self.time - len(part) :] for row, part in zip(output.logits, parts)], output.cache

    def close(self, found, row, start: int) -> None:
        """Logits [t v] of a row from token `start` on, within what such noise allows."""
        where = slice(start, start + len(found))
        error = np.abs(found - self.wanted[row, where])
        allowed = budget.CONFIDENCE * self.scatter[row, where] + 1e-4
        assert (error <= allowed).all(), (row, start, (error / allowed).max())


@pytest.fixture(scope="module")
def case(root, tmp_path_factory) -> Case:
    return Case(goldens.load(root / "tests" / "goldens" / "bias", tmp_path_factory.mktemp("checkpoint")))


def test_prefill_errs_as_much_as_rounding_does_and_keeps_the_likeliest_token(case):
    rows, cache = case.cached(list(case.tokens))
    assert case.time > 2 * case.chunk
    for row, logits in enumerate(rows):
        case.close(logits, row, 0)
    # Most errors of what scatters normally are below its deviation, half of them below 0.67 of it; a few rows take other experts.
    error = np.abs(np.stack(rows) - case.wanted)
    assert 0.3 < np.median(error) / np.median(case.scatter) < 1.0
    assert np.mean(np.stack(rows).argmax(-1) == case.wanted.argmax(-1)) >= TOP_1
    assert cache.tail[0].keys.values.dtype == jnp.int8


def test_prefill_in_two_parts_at_any_split_then_tokens_one_by_one(case):
    for split in (1, case.chunk - 1, case.chunk, case.chunk + 1, 2 * case.chunk + 3):
        first, cache = case.cached([row[:split] for row in case.tokens])
        second, _ = case.cached([row[split:] for row in case.tokens], cache)
        for row in range(2):
            case.close(first[row], row, 0)
            case.close(second[row], row, split)
    first, cache = case.cached([row[: case.chunk - 2] for row in case.tokens])
    for i in range(case.chunk - 2, case.time):  # over two borders of chunks
        output = case.step(case.tokens[:, i : i + 1], np.ones((2, 1), np.int32), cache)
        cache = output.cache
        for row in range(2):
            case.close(np.asarray(output.logits)[row], row, i)


def test_rows_at_different_positions_decode_as_if_alone(case):
    at = [3, case.time - 9]
    _, cache = case.cached([row[:n] for row, n in zip(case.tokens, at)])
    for _ in range(case.chunk // 2):
        tokens = np.stack([row[n : n + 1] for row, n in zip(case.tokens, at)])
        output = case.step(tokens, np.ones((2, 1), np.int32), cache)
        cache = output.cache
        for row, n in enumerate(at):
            case.close(np.asarray(output.logits)[row], row, n)
        at = [n + 1 for n in at]


def test_the_noise_that_allows_it_is_no_excuse_for_a_scale_of_another_token(case):
    """The measure can fail: scales moved on by one slot are far outside."""
    _, cache = case.cached([row[:-1] for row in case.tokens])

    is_held = lambda node: isinstance(node, QuantizedArray)  # noqa: E731
    shifted = lambda node: QuantizedArray(node.values, jnp.roll(node.scales, 1, -2)) if is_held(node) else node  # noqa: E731
    wrong = jax.tree.map(shifted, cache, is_leaf=is_held)
    logits = np.asarray(case.step(case.tokens[:, -1:], np.ones((2, 1), np.int32), wrong).logits)
    with pytest.raises(AssertionError):
        case.close(logits[0], 0, case.time - 1)


CONFIG = tiny.text_config(num_layers=2)  # a chunked layer of 4 slots, and a global one


@pytest.fixture(scope="module")
def small():
    return tiny.model(CONFIG, scan=False)


def test_what_is_held_is_within_half_a_step_of_what_came(small):
    """Of a chunked layer, nine tokens: the last four, each in its slot."""
    attention, x = small.decoder.tail[0].attention, jax.random.normal(jax.random.key(0), (2, 9, CONFIG.text.embed_dim))

    @jax.jit
    def run(cache):
        return attention(x, small.context(x.shape[:2], cache=cache), cache.tail[0])[1]

    exact, held = (run(small.init_cache(2, 9, dtype)) for dtype in ("float32", "int8"))
    for wanted, got in ((exact.keys, held.keys), (exact.values, held.values)):
        assert got.scales.shape == (2, 2, 4, 1) and got.values.shape == wanted.shape
        np.testing.assert_allclose(got.scales[..., 0], jnp.max(jnp.abs(wanted), -1) / 127, rtol=1e-5)
        error = jnp.abs(got.dequantize() - wanted) / got.scales
        assert 0.4 < error.max() <= 0.5 + 1e-3  # ties, to the rounding of two programs


class Displaced(DecoderAttention):
    """Attention to keys and values moved by constants to where rounding puts them."""

    def __init__(self, attention: DecoderAttention):
        self.config, self.kind, self.norm_eps = attention.config, attention.kind, attention.norm_eps
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.output = attention.output

    def _attend(self, query, key, value, context, cache):
        move = lambda x: x + jax.lax.stop_gradient(products.rounded(x, "int8") - x)  # noqa: E731
        return super()._attend(query, move(key), move(value), context, cache)


def test_training_attends_to_what_decoding_reads(small):
    """Nine tokens, over three chunks; sums in another order move logits of 9 by less than a thousandth of what rounding does."""
    tokens = np.random.RandomState(0).randint(0, 128, (2, 9)).astype(np.int32)
    forward = jax.jit(lambda tokens: small(tokens).logits, compiler_options=QUICK)
    with CACHED_AS("int8"):
        trained = forward(tokens)
    run = jax.jit(lambda tokens, cache: small(tokens, cache=cache), compiler_options=QUICK)
    output = run(tokens[:, :5], small.init_cache(2, 9, "int8"))
    read = [output.logits]
    for i in range(5, 9):
        output = run(tokens[:, i : i + 1], output.cache)
        read.append(output.logits)
    moved = np.abs(trained - forward(tokens)).max()
    assert moved > 0.05
    np.testing.assert_allclose(trained, np.concatenate(read, axis=1), rtol=0, atol=1e-3 * moved)


def test_gradients_pass_straight_through_rounded_keys_and_values(small):
    attention, x = small.decoder.tail[1].attention, jax.random.normal(jax.random.key(0), (2, 9, CONFIG.text.embed_dim))
    loss = lambda node: jnp.sum(jnp.sin(node(x, small.context(x.shape[:2]))[0]))  # noqa: E731
    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)
    wanted, exact = gradients(Displaced(attention)), gradients(attention)
    with CACHED_AS("int8"):
        found = gradients(attention)
    for name in ("query", "key", "value", "output"):
        each = [np.asarray(getattr(node, name).kernel[...]) for node in (found, wanted, exact)]
        scale = np.abs(each[1]).max()
        np.testing.assert_allclose(each[0] / scale, each[1] / scale, rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(each[0] - each[2]).max() / scale > 1e-3, name


def test_without_it_nothing_is_rounded(small):
    forward = lambda tokens: small(tokens).logits  # noqa: E731
    tokens = np.ones((1, 9), np.int32)
    plain = str(jax.make_jaxpr(forward)(tokens))
    with CACHED_AS("int8"):
        rounded = str(jax.make_jaxpr(forward)(tokens))
    assert " round" not in plain and " round" in rounded and "i8[" in rounded


def test_bytes_are_a_number_each_and_a_scale_for_each_token_and_head(small):
    cache = small.init_cache(2, 9, "int8")
    slots, heads, head_dim = 4 + 9, 2, 8
    assert cache.nbytes - cache.lengths.nbytes == 2 * 2 * slots * heads * (head_dim + 4)
    assert accounting.cache_bytes(CONFIG, 9, batch=2, dtype="int8") == 2 * 2 * slots * heads * (head_dim + 4)
    scout = presets.scout()  # heads of 128 numbers: 132 bytes for 256
    int8, bfloat16 = (accounting.cache_bytes(scout, 262_144, dtype=dtype) for dtype in ("int8", "bfloat16"))
    assert int8 / bfloat16 == 132 / 256


def test_dtypes_that_a_cache_cannot_have_are_refused(small):
    for dtype in ("int4", "int16", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=rf"a cache of {dtype} .* use float32, bfloat16, or int8"):
            small.init_cache(1, 9, dtype)
    with pytest.raises(ValueError, match="a cache of int4 is not counted here; use one of float32, bfloat16, int8"):
        accounting.cache_bytes(CONFIG, 9, dtype="int4")


def test_generate_and_stream_pass_the_dtype_on(small):
    assert len(infer.generate(small, [[5, 17, 90, 3, 1]], max_new_tokens=6, cache_dtype="int8")[0]) == 6
    with pytest.raises(ValueError, match="a cache of int4"):
        infer.generate(small, [[5]], max_new_tokens=1, cache_dtype="int4")
    with pytest.raises(ValueError, match="a cache of int4"):
        next(infer.stream(small, [5], max_new_tokens=1, cache_dtype="int4"))


def test_values_and_scales_lie_on_the_same_devices(small):
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 1, 1, 2), partitioning.MESH_AXES)
    places = programs.cache_shardings(small.init_cache(4, 8, "int8"), partitioning.SERVE, mesh)
    for layer in places.tail:
        assert layer.keys.values.spec == layer.keys.scales.spec == PartitionSpec("data", "tensor", None, None)
    assert places.lengths.spec == PartitionSpec("data")
