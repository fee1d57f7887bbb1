"""The program that makes parameters of a released checkpoint's tensors, against the model that the tensors came from."""

import jax
import numpy as np
from flax import nnx

from llama4_jax.checkpoint import hf, layouts, mapping
from llama4_jax.config import presets
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.plan import conversion


def test_the_program_makes_the_parameters_that_the_tensors_were_made_from():
    config = presets.tiny()  # two stacked periods, a tail, and a vision tower
    structure, shapes = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0).standard_normal
    params = {name: draw(leaf.shape, np.float32) for name, leaf in shapes.items()}
    table = mapping.entries(config, layouts.HF_FUSED, stacked=True)
    stored = hf.to_tensors(structure.merge(params))
    named = {entry.key: stored[entry.key].reshape(conversion.opened(entry, params[entry.path])) for entry in table}
    made = jax.jit(lambda named: conversion.assemble(named, table, params))(named)
    assert made.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(made[path], array, err_msg=path)
        assert made[path].dtype == array.dtype
