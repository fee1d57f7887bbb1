"""Models in few bits, each made in one compiled program: quicker for tests than tensor by tensor (`quant.ptq`)."""

from __future__ import annotations

import jax
from flax import nnx

from llama4_jax.config.quant import QuantRecipe
from llama4_jax.core import names, quantized
from llama4_jax.nn import products
from llama4_jax.quant import forms, matrices, recipe


def quantised(model: nnx.Module, rules: QuantRecipe) -> nnx.Module:
    """`model`, of plain arrays, rounded to nearest."""
    params = names.held(model)
    chosen = recipe.specs(params, rules)

    @jax.jit
    def rounded(params):
        inputs = {name: forms.inputs_of(name, array.ndim) for name, array in params.items()}
        return {name: quantized.quantize(array, chosen[name], inputs[name]) for name, array in params.items()}

    return matrices.replaced(model, rounded({name: params[name] for name in chosen}))


def floats(model: nnx.Module) -> nnx.Module:
    """The model of plain arrays that few bits stand for; rows that are rounded are rounded still."""

    @jax.jit
    def plain(held):
        return {name: products.like(weight, products.floats(weight, weight.dtype)) for name, weight in held.items()}

    return matrices.replaced(model, plain(matrices.quantised(model)))
