"""A model in few bits is saved from one mesh and loaded onto others, each device reading what it holds."""

import numpy as np
import pytest

from llama4_jax import checkpoint
from llama4_jax.checkpoint import native
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import names, partitioning
from llama4_jax.quant import ptq
from llama4_jax.testing import tiny

pytestmark = pytest.mark.multidevice

RECIPE = QuantRecipe(
    name="experts and attention",
    rules=(
        ("decoder.*.experts.*", QuantSpec(group=4, symmetric=False)),
        ("decoder.*.attention.*.kernel", QuantSpec(group=None)),
    ),
)


def test_a_model_in_few_bits_goes_from_mesh_to_mesh_with_the_same_bits(tmp_path):
    model = ptq.quantise(tiny.model(tiny.text_config(2)), RECIPE)
    wanted = {name: np.asarray(leaf) for name, leaf in names.split(model)[1].items()}
    serving = partitioning.make_mesh({"expert": 4, "tensor": 2})
    training = partitioning.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    native.save_native(model, tmp_path / "first")
    first = native.load_native(tmp_path / "first", mesh=training)
    native.save_native(first, tmp_path / "second")
    checkpoint.save_hf(first, tmp_path / "published")
    second = native.load_native(tmp_path / "second", mesh=serving, placement=partitioning.SERVE)
    third = checkpoint.load_hf(tmp_path / "published", mesh=training, keep_quantised=True)
    for loaded, mesh, placement in (
        (first, training, partitioning.TRAIN),
        (second, serving, partitioning.SERVE),
        (third, training, partitioning.TRAIN),
    ):
        places = names.split(partitioning.shardings(loaded, placement, mesh))[1]
        split = 0
        for name, array in names.split(loaded)[1].items():
            assert array.sharding == places[name], name
            np.testing.assert_array_equal(np.asarray(array, np.float32), wanted[name].astype(np.float32), err_msg=name)
            split += array.addressable_shards[0].data.size < array.size and name.endswith((".values", ".scales"))
        assert split > 6, split
