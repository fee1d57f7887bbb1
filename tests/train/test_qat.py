"""Quantisation-aware training: its schedule, what it trains, and that a run is resumed to the bit."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CountingLoader, quick_model, run_config, small_config

from llama4_jax.checkpoint.store import load_params
from llama4_jax.config.train import QatConfig
from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.nn.attention import CACHED_AS
from llama4_jax.quant import fake, matrices, recipe
from llama4_jax.train import metrics, pretrain, qat
from llama4_jax.train.loop import Callback

EXPERTS = "decoder.tail.1.feed_forward.experts."
GATE_UP, DOWN = EXPERTS + "gate_up", EXPERTS + "down"


def experts() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {GATE_UP: jax.random.normal(keys[0], (2, 16, 2, 8)), DOWN: jax.random.normal(keys[1], (2, 8, 16))}


def half_square(params) -> jax.Array:
    """Its gradient in what products see is what they see."""
    return sum(0.5 * jnp.sum(jnp.square(jnp.asarray(leaf))) for leaf in params.values())


def gradients(config: QatConfig):
    """step -> gradients, in one program."""
    square = lambda params: (jax.grad(half_square)(params), None)  # noqa: E731
    take = jax.jit(lambda params, step: qat.through(square, params, config, step)[0])
    return lambda step: take(experts(), jnp.int32(step))


def rounded(preset: str, values: str | None = None) -> dict[str, jax.Array]:
    specs = recipe.specs(experts(), QatConfig(recipe=preset, group=8).preset)
    specs = qat._eight_bits(specs) if values == "int8" else specs
    return {name: held.dequantize() for name, held in fake.packed(experts(), specs).items()}


def test_one_program_rounds_nothing_then_to_eight_bits_then_to_four():
    config = QatConfig(recipe="int4_experts", group=8, start=3, gradual=2)
    wanted = {2: experts(), 3: rounded("int4_experts", "int8"), 4: rounded("int4_experts", "int8")}
    wanted |= {step: rounded("int4_experts") for step in (5, 1000)}
    taken = gradients(config)
    for step, params in wanted.items():
        for name, gradient in taken(step).items():
            # Through a ratio and back: each way rounds once.
            np.testing.assert_allclose(gradient, params[name], rtol=1e-6, err_msg=f"step {step} {name}")
            np.testing.assert_array_equal(qat.seen(experts(), config, step)[name], params[name])
    levels = [len(np.unique(rounded("int4_experts", values)[DOWN][0, :, 0])) for values in ("int8", None)]
    assert levels[0] > levels[1]


def test_rounding_of_inputs_sets_in_at_its_step_too():
    config = QatConfig(recipe="fp8_mixed", group=8, start=3)
    taken = gradients(config)
    for step, params in {2: experts(), 3: rounded("fp8_mixed")}.items():
        for name, gradient in taken(step).items():
            np.testing.assert_allclose(gradient, params[name], rtol=1e-6, err_msg=f"step {step} {name}")
        assert isinstance(qat.seen(experts(), config, step)[DOWN], QuantizedArray) == (step >= 3)


@pytest.mark.parametrize("preset", [None, "int4_experts"])
def test_rounding_of_keys_and_values_sets_in_at_its_step_with_a_recipe_or_alone(preset):
    config = QatConfig(recipe=preset, group=8, start=3, cache="int8")
    sees = lambda params: (params, jnp.array(CACHED_AS.value == "int8"))  # noqa: E731
    take = jax.jit(lambda step: qat.through(sees, experts(), config, step)[1])
    watched = []
    callback = pretrain._seeing(Callback(1, lambda *_: watched.append(CACHED_AS.value)), run_config(qat=config))
    for step in (2, 3, 1000):
        assert take(jnp.int32(step)) == (step >= 3)
        callback.run(experts(), step)
    assert watched == [None, "int8", "int8"] and CACHED_AS.value is None


def test_ranges_to_be_learned_must_be_there():
    with pytest.raises(ValueError, match="no decoder.*down.range; add them with train.qat.prepared"):
        gradients(QatConfig(recipe="int4_experts", group=8, ranges="learned"))(0)


def mixture_alone():
    """A layer with every kind of matrix that is rounded."""
    text = small_config().text
    text = dataclasses.replace(text, num_layers=1, moe=dataclasses.replace(text.moe, step=1))
    return dataclasses.replace(small_config(), text=text)


def run(folder, config, callbacks=()):
    return pretrain.run(quick_model(mixture_alone()), CountingLoader(), config, folder=folder, callbacks=callbacks)


def test_a_run_learns_weights_and_ranges_comes_back_packed_and_resumes_to_the_bit(tmp_path):
    rounding = QatConfig(recipe="int4_all", group=8, start=3, ranges="learned")
    config = run_config(steps=12, save_every=6, compute_dtype="bfloat16", qat=rounding)
    shown = {}
    watch = Callback(2, lambda params, step: shown.update({step: {n: np.array(p) for n, p in params.items()}}))
    model = run(tmp_path / "whole", config, [watch])
    params, _ = load_params(tmp_path / "whole" / "checkpoints")
    plain = names.split(quick_model(mixture_alone()))[1]
    specs = recipe.specs(plain, config.qat.preset)
    assert params.keys() == plain.keys() | {name + fake.RANGE for name in specs}
    assert {array.dtype for array in params.values()} == {np.dtype("float32")}
    curve = [line["loss"] for line in metrics.read(tmp_path / "whole" / "metrics.jsonl")]
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:2])
    for name in specs:
        assert jnp.any(params[name] != plain[name]) and jnp.any(params[name + fake.RANGE] != 1.0), name

    held = matrices.quantised(model)
    assert held.keys() == specs.keys() and {leaf.values.dtype for leaf in held.values()} == {np.dtype("int4")}
    for name, packed in fake.packed(params, specs).items():
        jax.tree.map(np.testing.assert_array_equal, packed, names.held(model)[name])
        if name in held:  # what callbacks saw at the end
            np.testing.assert_array_equal(shown[12][name], packed.dequantize())
    assert len(np.unique(shown[2][next(iter(specs))])) > len(np.unique(shown[12][next(iter(specs))]))

    shutil.copytree(tmp_path / "whole" / "checkpoints" / "6", tmp_path / "resumed" / "checkpoints" / "6")
    run(tmp_path / "resumed", config)
    resumed, _ = load_params(tmp_path / "resumed" / "checkpoints")
    for name, array in params.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
