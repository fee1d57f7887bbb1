"""Weights of few bits over eight devices: the logits, the gradients of adapters and the ids of one device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import infer
from llama4_jax.config import Llama4Config, presets, quant
from llama4_jax.config.lora import LoraConfig
from llama4_jax.core import partitioning
from llama4_jax.model import lora
from llama4_jax.testing import adapters, budget, few_bits, flips, tiny

pytestmark = pytest.mark.multidevice

# Widths over `tensor`: a row's scale is that of all its parts.
MESHES = [{"expert": 4, "tensor": 2}]
MORE = [
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 2, "fsdp": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def adapted():
    """A chunked dense layer, then a global one with experts; rows rounded to int8; adapters beside every kernel."""
    config = presets.tiny()
    attention = dataclasses.replace(config.text.attention, nope_interval=2, num_kv_heads=2)
    text = dataclasses.replace(config.text, num_layers=2, attention=attention)
    model = few_bits.quantised(tiny.model(Llama4Config(text=text)), quant.w4a8(group=4))
    return adapters.trained(model, LoraConfig(rank=2, targets=("*",)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(1, 100, (8, 32)).astype(np.int32)


def logits_and_gradients(model, tokens):
    structure, factors, base = lora.split(model)

    @jax.jit
    def run(factors, base, tokens):
        def loss(factors):
            logits = structure.merge(factors | base)(tokens).logits
            return jnp.mean(jax.nn.logsumexp(logits, -1)), logits

        return jax.grad(loss, has_aux=True)(factors)

    gradients, logits = run(factors, base, tokens)
    return np.asarray(logits), jax.tree.map(np.asarray, gradients)


@pytest.fixture(scope="module")
def alone(adapted, tokens):
    return logits_and_gradients(adapted, tokens)


@pytest.fixture(scope="module")
def unrounded(adapted, tokens):
    return np.asarray(jax.jit(lambda model: model(tokens).logits)(flips.unrounded(adapted)))


@pytest.mark.parametrize("sizes", MESHES + [pytest.param(sizes, marks=pytest.mark.thorough) for sizes in MORE], ids=str)
def test_logits_and_gradients_of_adapters_do_not_depend_on_the_mesh(adapted, tokens, alone, unrounded, sizes):
    mesh = partitioning.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    placed = jax.device_put(adapted, partitioning.shardings(adapted, partitioning.TRAIN, mesh))
    rows = jax.device_put(tokens, partitioning.batch_sharding(tokens.shape, partitioning.TRAIN, mesh))
    with jax.set_mesh(mesh):
        logits, gradients = logits_and_gradients(placed, rows)
    where = flips.flipped(logits, alone[0], unrounded)
    # Of a token with a flip the loss, and what it adds to a gradient, is off by as much of itself as its logits may be.
    noise = np.sqrt(np.mean(np.square(alone[0] - unrounded)) / np.mean(np.square(alone[0])))
    allowed = budget.CONFIDENCE * noise * (np.mean(where) + flips.UNFLIPPED)
    for name, gradient in gradients.items():
        scale = np.abs(alone[1][name]).max() + 1e-6
        assert np.mean(np.abs(gradient - alone[1][name])) / scale < allowed, name


@pytest.mark.thorough  # test_low_bit_serving.py decodes a smaller model
@pytest.mark.parametrize("placement", [partitioning.TRAIN, partitioning.SERVE], ids=lambda placement: placement.name)
def test_decoding_does_not_depend_on_the_mesh(adapted, placement):
    model, prompts = lora.detach(adapted), [[1, 2, 3], [*range(4, 30)]]
    said = infer.generate(model, prompts, max_new_tokens=12)
    mesh = partitioning.make_mesh({"expert": 4, "tensor": 2})
    with partitioning.use(mesh, placement):
        placed = jax.device_put(model, partitioning.shardings(model, placement, mesh))
        assert infer.generate(placed, prompts, max_new_tokens=12) == said
