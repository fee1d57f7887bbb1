"""One step: accumulation, finiteness, precision, load balance, and that it learns at all."""

import dataclasses
import functools

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import CountingLoader, quick_model, run_config, small_config

from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.train import losses, optim, step
from llama4_jax.train.state import cast, create

FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0, final_fraction=1.0)


def assemble(model_config, config: TrainConfig):
    structure, params = names.split(quick_model(model_config))
    optimizer = optim.make(config.optimizer, config.steps)
    objective = functools.partial(losses.next_token, config=config)
    # On its device for good, as the loop has it: the compiled step is then found in the cache.
    state = jax.device_put(create(params, optimizer), jax.devices()[0])
    return state, step.make(structure, objective, optimizer, config, model_config.text)


def batch_with_images(config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two rows of one picture each, then text; the loss is on the text."""
    patches, time = config.vision.tokens_per_tile, 12
    tokens = rng.integers(0, 31, (2, time)).astype(np.int32)
    tokens[:, 1 : 1 + patches] = config.patch_token
    weights = np.zeros((2, time), np.float32)
    weights[:, patches + 1 : -1] = 1.0
    side = config.vision.image_size
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "positions": np.tile(np.arange(time, dtype=np.int32), (2, 1)),
        "segments": np.ones((2, time), np.int32),
        "images": rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32),
    }


def test_one_repeated_batch_is_learned_to_near_zero():
    """All at once: pictures, scanned layers, microbatches, recomputation, every loss."""
    text = dataclasses.replace(small_config().text, num_layers=4)
    vision = dataclasses.replace(presets.tiny().vision, num_layers=1)
    model_config = dataclasses.replace(small_config(), text=text, vision=vision, patch_token=31)
    losses_on = {"balance_loss": 1e-3, "router_z_loss": 1e-4, "z_loss": 1e-5}
    config = TrainConfig(steps=60, optimizer=FAST, accumulation=2, remat="block", **losses_on)
    state, take = assemble(model_config, config)
    rng = np.random.default_rng(0)
    batches = [batch_with_images(model_config, rng) for _ in range(2)]
    batch = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    curve = []
    for _ in range(config.steps):
        state, metrics = take(state, batch)
        curve.append(float(metrics["loss"]))
    assert curve[0] > 3.0 and curve[-1] < 0.02
    assert int(state.step) == config.steps
    assert metrics["load"].shape == (2, 4)  # layers 1 and 3 of four are mixtures of four
    assert {"grad_norm/vision.patch", "grad_norm/decoder.feed_forward.router", "grad_norm/embed"} <= set(metrics)


def test_accumulated_microbatches_equal_one_batch():
    """With different weights in each microbatch: a mean of means would be off."""
    loader = CountingLoader(batch=4)
    batches = [next(loader) for _ in range(3)]
    batches[1]["loss_weights"][:, 5:] = 0.0
    batches[2]["loss_weights"] *= 0.25
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    results = []
    for accumulation, batch in ((1, whole), (3, stacked)):
        config = TrainConfig(steps=1, accumulation=accumulation, z_loss=1e-3)
        structure, params = names.split(bigram.Bigram())
        before = jax.tree.map(jnp.copy, params)
        plain = optax.sgd(1.0)  # Adam's first step is a sign, which turns rounding into differences of size 1
        objective = functools.partial(losses.next_token, config=config)
        take = step.make(structure, objective, plain, config, presets.tiny().text)
        state, metrics = take(create(params, plain), batch)
        results.append((jax.tree.map(jnp.subtract, before, state.params), metrics))
    (one, one_metrics), (three, three_metrics) = results
    np.testing.assert_allclose(one_metrics["loss"], three_metrics["loss"], rtol=1e-6)
    assert one_metrics["weight"] == three_metrics["weight"]
    tokens, eps = whole["tokens"].size, np.finfo(np.float32).eps
    for name, gradient in one.items():
        # A sum over all tokens, and a difference of parameters of size 1.
        tolerance = eps * (tokens**0.5 * float(jnp.abs(gradient).max()) + 1.0)
        np.testing.assert_allclose(three[name], gradient, rtol=0, atol=tolerance)


def test_microbatches_draw_from_different_generators():
    def objective(model, batch, rng):
        draw = jax.random.uniform(rng)
        unmoved = 0.0 * model.embed.table[...].sum()
        return losses.Terms(unmoved + draw, jnp.float32(1), {"draw": draw, "square": draw**2})

    structure, params = names.split(bigram.Bigram())
    config = TrainConfig(steps=2, accumulation=2)
    optimizer = optim.make(config.optimizer, 2)
    take = step.make(structure, objective, optimizer, config, presets.tiny().text)
    state, first = take(create(params, optimizer, seed=1), {"tokens": np.zeros((2, 1, 1))})
    assert abs(first["square"] - first["draw"] ** 2) > 1e-6  # the two draws differ
    _, second = take(state, {"tokens": np.zeros((2, 1, 1))})
    assert second["draw"] != first["draw"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(value):
    state, take = bigram.assemble(TrainConfig(steps=5))
    state, metrics = take(state, next(CountingLoader()))
    assert metrics["finite"]
    before = jax.tree.map(jnp.copy, state)
    batch = next(CountingLoader())
    batch["loss_weights"][0, 0] = value
    state, metrics = take(state, batch)
    assert not metrics["finite"]
    assert bigram.equal(state, before)


def test_a_batch_without_weights_is_a_step_without_gradient():
    state, take = bigram.assemble(TrainConfig(steps=5, optimizer=OptimizerConfig(weight_decay=0.0)))
    before = jax.tree.map(jnp.copy, state.params)
    batch = next(CountingLoader())
    batch["loss_weights"][:] = 0.0
    state, metrics = take(state, batch)
    assert metrics["finite"] and metrics["grad_norm"] == 0.0
    assert bigram.equal(state.params, before)


def test_the_program_does_not_grow_with_depth():
    def lines(layers: int) -> int:
        text = dataclasses.replace(small_config().text, num_layers=layers)
        model_config = dataclasses.replace(small_config(), text=text)
        structure, params = names.split(jax.eval_shape(lambda: Llama4(model_config, rngs=nnx.Rngs(0))))
        config = TrainConfig(steps=1)
        optimizer = optim.make(config.optimizer, config.steps)
        objective = functools.partial(losses.next_token, config=config)
        take = step.make(structure, objective, optimizer, config, text)
        state = jax.eval_shape(lambda p: create(p, optimizer), params)
        return take.lower(state, next(CountingLoader())).as_text().count("\n")

    assert lines(4) == lines(12)


def test_the_state_is_donated():
    state, take = bigram.assemble(TrainConfig(steps=5))
    take(state, next(CountingLoader()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_bfloat16_compute_keeps_master_weights_and_router_in_float32():
    curves = {}
    for dtype in ("float32", "bfloat16"):
        state, take = assemble(small_config(), run_config(compute_dtype=dtype))
        loader, curves[dtype] = CountingLoader(), []
        for _ in range(24):
            state, metrics = take(state, next(loader))
            curves[dtype].append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in state.params.values()} == {np.dtype("float32")}
    assert curves["bfloat16"] != curves["float32"]
    start, end = curves["float32"][0], np.mean(curves["float32"][-5:])
    assert end < 0.6 * start
    # Batches differ from each other by more than this share of what was learned.
    assert abs(np.mean(curves["bfloat16"][-5:]) - end) < 0.1 * (start - end)
    dtypes = {name: leaf.dtype for name, leaf in cast(state.params, jnp.bfloat16).items()}
    assert {name.rsplit(".", 2)[-2] for name, dtype in dtypes.items() if dtype == jnp.float32} == {"router"}


def test_selection_bias_evens_the_load_without_a_loss():
    text = small_config().text
    moe = dataclasses.replace(text.moe, selection_bias=True, top_k=1)
    model_config = dataclasses.replace(small_config(), text=dataclasses.replace(text, moe=moe))
    still = OptimizerConfig(learning_rate=1e-9, warmup_steps=0)
    state, take = assemble(model_config, TrainConfig(steps=100, optimizer=still, bias_rate=0.01))
    (name,) = [name for name in state.params if name.endswith("selection_bias")]
    state.params[name] = jnp.array([0.3, 0.0, 0.0, -0.3])  # a router that has made up its mind
    loader, imbalance = CountingLoader(batch=16), []
    for _ in range(100):
        state, metrics = take(state, next(loader))
        imbalance.append(float(metrics["load"].max() * 4))
    assert np.mean(imbalance[:3]) > 2.0
    assert np.mean(imbalance[-20:]) < 1.3


def test_selection_bias_rows_follow_the_layers():
    text = dataclasses.replace(presets.tiny().text, num_layers=11)
    moe = dataclasses.replace(text.moe, selection_bias=True)
    config = dataclasses.replace(presets.tiny(), text=dataclasses.replace(text, moe=moe))
    # Period 4, two of them: mixtures are layers 1 3 5 7 (scanned) and 9 (left over, third of nothing: tail 1).
    scanned = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))[0].names
    part = ".feed_forward.router.selection_bias"
    assert step.selection_rows(scanned, config.text) == {
        f"decoder.period.1{part}": [0, 2],
        f"decoder.period.3{part}": [1, 3],
        f"decoder.tail.1{part}": [4],
    }
    plain = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=False)))[0].names
    assert list(step.selection_rows(plain, config.text).values()) == [[0], [1], [2], [3], [4]]


def test_selection_bias_moves_up_for_the_idle_and_down_for_the_busy():
    rows = {"stacked": [0, 2], "single": [1]}
    params = {"stacked": jnp.zeros((2, 3)), "single": jnp.zeros(3), "other": jnp.zeros(1)}
    load = jnp.array([[0.0, 0.25, 0.75], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    moved = step.move_selection_bias(params, load, rows, 0.5)
    np.testing.assert_array_equal(moved["stacked"], [[0.5, 0.5, -0.5], [-0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(moved["single"], [-0.5, 0.5, 0.5])
    assert set(moved) == set(rows)


def test_a_bias_rate_without_a_bias_is_refused():
    with pytest.raises(ValueError, match="no selection bias; set moe.selection_bias=true"):
        assemble(small_config(), TrainConfig(steps=1, bias_rate=0.1))


def test_groups_are_modules_without_layer_numbers():
    assert step.group("decoder.period.3.attention.query.kernel") == "decoder.attention.query"
    assert step.group("decoder.tail.0.feed_forward.experts.gate_up") == "decoder.feed_forward.experts"
    assert step.group("embed.table") == "embed"
