"""A model that several devices serve, in few bits or not: each multiplies with its part of the weights as it lies."""

import jax
import numpy as np
import pytest

from llama4_jax import infer
from llama4_jax.config import quant
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import partitioning
from llama4_jax.quant import ptq
from llama4_jax.testing import flips, tiny

pytestmark = pytest.mark.multidevice

MESH = {"expert": 2, "tensor": 2}


def floats():
    return tiny.model(tiny.text_config(num_layers=1), scan=False)


def few_bits(recipe):
    return ptq.quantise(floats(), recipe)


def steps(model, cache_dtype="int8"):
    """Logits of a prompt and of a token more."""

    @jax.jit
    def run(model, tokens, cache):
        output = model(tokens, cache=cache)
        return output.logits, output.cache

    tokens = np.random.RandomState(0).randint(0, 128, (4, 6)).astype(np.int32)
    first, cache = run(model, tokens[:, :5], model.init_cache(4, 8, cache_dtype))
    return np.concatenate([first, run(model, tokens[:, 5:], cache)[0]], axis=1)


# Rounded rows and offsets wherever the decoder has a matrix, and outputs that fill no tile of a device.
ALL = QuantRecipe(
    name="all",
    rules=(
        *((name, QuantSpec(group=4, symmetric=False, activations="int8")) for name, _ in quant.w4a8().rules),
        ("head.kernel", QuantSpec(group=4)),
    ),
)


def decoded_on_a_mesh(model, cache_dtype):
    """`steps` of `model` on several devices."""
    mesh = partitioning.make_mesh(MESH, jax.devices()[:4])
    with partitioning.use(mesh, partitioning.SERVE):
        placed = jax.device_put(model, partitioning.shardings(model, partitioning.SERVE, mesh))
        prepared = infer.prepare(placed)
        places = partitioning.shardings(prepared, partitioning.SERVE, mesh)
        for leaf, place in zip(*map(jax.tree.leaves, (prepared, places)), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)
        assert prepared.head.kernel.shape == (
            32,
            2 * 128,
        )  # 64 of 128 tokens on each of two devices, filled up to a tile
        assert jax.tree.structure(infer.prepare(prepared)) == jax.tree.structure(prepared)
        return steps(prepared, cache_dtype)


def test_decoding_in_few_bits_does_not_depend_on_the_mesh():
    model = few_bits(ALL)
    found = decoded_on_a_mesh(model, "int8")
    flips.flipped(found, steps(model), steps(flips.unrounded(model), "float32"))


def test_decoding_in_floats_does_not_depend_on_the_mesh():
    model = floats()
    np.testing.assert_allclose(decoded_on_a_mesh(model, "float32"), steps(model, "float32"), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "placement", "as_they_lie"),
    [
        (quant.int4_all, partitioning.SERVE, True),
        (quant.w4a8, partitioning.SERVE, True),
        (quant.int4_all, partitioning.TRAIN, False),  # gradients of floats are added up
    ],
    ids=["serve", "rounded rows", "train"],
)
def test_experts_enter_each_device_in_few_bits_where_they_are_only_read(make, placement, as_they_lie):
    model = few_bits(make(4))
    with partitioning.use(partitioning.make_mesh(MESH, jax.devices()[:4]), placement):
        jaxpr = jax.make_jaxpr(lambda model: model.hidden(np.ones((4, 6), np.int32)).hidden)(model)
    entering = {value.aval.dtype.name for equation in equations(jaxpr) for value in equation.invars}
    assert ("int4" in entering) == as_they_lie


def equations(jaxpr):
    """Those of `jax.shard_map` in a program, and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation
        for part in jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "eqns")):
            if hasattr(part, "eqns"):
                yield from equations(part)
