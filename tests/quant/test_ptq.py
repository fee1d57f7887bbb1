"""Rounding whole models and single tensors without text: what changes, what stays, and that pieces make no difference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config.quant import PRESETS, QuantRecipe, QuantSpec, int4_all, int4_experts
from llama4_jax.core import names, quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import matrices, ptq, recipe, report, rounding
from llama4_jax.testing import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.text_config(num_layers=4))


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_recipe_names_is_in_few_bits_and_all_else_is_the_same_array(model, name):
    rules = PRESETS[name](8)
    before, after = names.held(model), names.held(ptq.quantise(model, rules))
    chosen = recipe.specs(before, rules)
    assert chosen and before.keys() == after.keys()
    for key, leaf in after.items():
        if key not in chosen:
            assert leaf is before[key], key
            continue
        assert isinstance(leaf, QuantizedArray) and leaf.values.dtype == chosen[key].values, key
        assert leaf.activations == chosen[key].activations and leaf.shape == before[key].shape
        assert jnp.max(jnp.abs(leaf.dequantize() - before[key])) < 0.1 * jnp.max(jnp.abs(before[key]))


def test_axes_and_structure_stay(model):
    after = ptq.quantise(model, int4_all(8))
    is_parameter = lambda node: isinstance(node, nnx.Param)  # noqa: E731
    pairs = zip(jax.tree.leaves(model, is_leaf=is_parameter), jax.tree.leaves(after, is_leaf=is_parameter), strict=True)
    assert all(one.axes == other.axes for one, other in pairs)
    assert type(after) is type(model) and after.config == model.config


def test_a_check_sees_a_matrix_that_was_left_out(model):
    rules = int4_experts(8)
    chosen = recipe.specs(names.held(model), rules)
    with pytest.raises(RuntimeError, match="decoder.period.0.feed_forward.experts.gate_up: wanted .*int4.*, got None"):
        ptq._checked(model, chosen)
    other = {name: dataclasses.replace(spec, values="int8") for name, spec in chosen.items()}
    with pytest.raises(RuntimeError, match="int8.*got .*int4"):
        ptq._checked(ptq.quantise(model, rules), other)


def test_recipes_follow_each_other_and_nothing_is_rounded_twice(model):
    once = ptq.quantise(model, int4_experts(8))
    rest = QuantRecipe(name="rest", rules=(("decoder.*.attention.*.kernel", QuantSpec(values="int8", group=None)),))
    held = matrices.quantised(ptq.quantise(once, rest))
    assert {leaf.values.dtype.name for leaf in held.values()} == {"int4", "int8"}
    with pytest.raises(ValueError, match="quantised already"):
        ptq.quantise(once, int4_all(8))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [("experts.gate_up", (4, 16, 2, 24), 0), ("attention.output.kernel", (2, 8, 24), 2), ("head.kernel", (16, 50), 1)],
)
@pytest.mark.parametrize("method", ["rtn", "clip"])
def test_tensors_in_pieces_are_those_in_one(name, shape, axis, method, monkeypatch):
    array = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))
    spec = QuantSpec(group=8, symmetric=False)
    whole = ptq.quantise_tensor(name, array, spec, method=method)
    monkeypatch.setattr(ptq, "PIECE", array.size // 3)
    assert ptq._pieces(shape, recipe.forms.inputs_of(name, len(shape)))[0] == axis
    pieces = ptq.quantise_tensor(name, array, spec, method=method)
    device = ptq.quantise_tensor(name, jnp.asarray(array), spec, method=method)
    for part in ("values", "scales", "offsets"):
        assert isinstance(getattr(pieces, part), np.ndarray) and isinstance(getattr(device, part), jax.Array)
        for other in (pieces, device):
            found, wanted = (np.asarray(getattr(held, part), np.float32) for held in (other, whole))
            np.testing.assert_array_equal(found, wanted)
    assert pieces.values.dtype == jnp.int4 and pieces.scales.dtype == jnp.bfloat16 and pieces.dtype == "bfloat16"


def test_rounding_is_that_of_the_arrays(model):
    name = "decoder.period.0.feed_forward.experts.down"
    weight, spec = names.held(model)[name], QuantSpec(group=8)
    held = [ptq.quantise_tensor(name, weight, spec, method=method) for method in ("rtn", "clip")]
    wanted = [quantized.quantize(weight, spec, (2,)), rounding.nearest(weight, spec, (2,))]
    for one, other in zip(held, wanted):
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("norm.scale", {}, "in no product"),
        ("head.kernel", {"method": "gptq"}, "wants text"),
        ("head.kernel", {"method": "best"}, "method='best' is unknown; use one of"),
        ("head.kernel", {"spec": QuantSpec(group=24)}, "group=24 does not divide"),
    ],
)
def test_tensors_that_cannot_be_rounded_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        ptq.quantise_tensor(name, np.zeros((16, 8), np.float32), **{"spec": QuantSpec(group=8)} | arguments)


def test_report_counts_parameters_bytes_and_bits_of_each_kind(model):
    figures = report.report(ptq.quantise(model, int4_experts(8)))
    experts = figures["routed experts"]
    # 4 layers of 4 experts of 3 * 32 * 24 weights: four bits each, and a scale of sixteen for every eight.
    assert experts["parameters"] == 4 * 4 * 3 * 32 * 24
    assert experts["share_of_parameters_quantised"] == experts["share_of_bytes_quantised"] == 1
    assert experts["bits_per_weight"] == 4 + 16 / 8 and experts["bytes"] == experts["parameters"] * 6 / 8
    total, parts = figures.pop("total"), figures.values()
    parameters = sum(leaf.size for leaf in names.held(model).values())
    assert total["parameters"] == parameters == sum(part["parameters"] for part in parts)
    assert total["share_of_parameters_quantised"] == experts["parameters"] / parameters
    assert total["bytes"] == experts["bytes"] + 4 * (parameters - experts["parameters"])
    assert total["share_of_bytes_quantised"] == experts["bytes"] / total["bytes"]
    assert figures["attention"]["share_of_parameters_quantised"] == 0 and figures["attention"]["bits_per_weight"] == 32


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_recipe_would_make_is_told_without_making_it(model, name):
    rules = PRESETS[name](8)
    made = ptq.quantise(model, rules)
    abstract = jax.eval_shape(lambda: model)
    assert report.report(abstract, rules) == report.report(made)
    shapes = {name: jax.eval_shape(lambda leaf=leaf: leaf) for name, leaf in matrices.quantised(made).items()}
    assert report.forecast(names.held(model), rules) == shapes


def test_the_table_lines_up():
    figures = report.report(jax.eval_shape(lambda: tiny.model(tiny.vision_config())), int4_all(8))
    lines = report.table(figures).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[1:]] == list(figures)
    assert list(figures)[0] == "vision" and list(figures)[-1] == "total"
