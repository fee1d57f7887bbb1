"""Placements turn logical axis names into splits over a mesh, or say what does not fit and what would."""

import dataclasses
import math

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llama4_jax.config import presets
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import LONG, SERVE, TRAIN, Placement
from llama4_jax.model import Llama4


def mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in partitioning.MESH_AXES)
    return AbstractMesh(shape, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_experts_are_split_by_expert_width_and_parameter_shard():
    axes, shape = ("experts", "expert_embed", "gate_up", "mlp"), (16, 5120, 2, 8192)
    spec = partitioning.spec(axes, shape, TRAIN, mesh(fsdp=8, expert=16, tensor=2))
    assert spec == PartitionSpec("expert", "fsdp", None, "tensor")


def test_training_splits_embeddings_over_every_axis_that_repeats_the_parameters_and_serving_does_not():
    axes, shape = ("embed", "heads", "head_dim"), (5120, 40, 128)
    where = mesh(fsdp=4, context=2, tensor=8)
    assert partitioning.spec(axes, shape, TRAIN, where) == PartitionSpec(("fsdp", "context"), "tensor", None)
    assert partitioning.spec(axes, shape, SERVE, where) == PartitionSpec(None, "tensor", None)


def test_a_batch_is_split_by_rows_and_by_time():
    where = mesh(slice=2, data=2, fsdp=4, context=8)
    spec = partitioning.spec(partitioning.BATCH_AXES, (32, 8192), TRAIN, where)
    assert spec == PartitionSpec(("slice", "data", "fsdp"), "context")


def test_long_rows_are_split_over_the_devices_that_split_experts():
    where = mesh(slice=2, expert=16, context=4)
    assert partitioning.spec(partitioning.BATCH_AXES, (2, 2**19), LONG, where) == PartitionSpec(
        "slice", ("expert", "context")
    )
    for axes in (("embed", "mlp"), ("experts", "expert_embed")):  # weights as in training
        assert partitioning.spec(axes, (64, 64), LONG, where) == partitioning.spec(axes, (64, 64), TRAIN, where)


def test_a_function_is_traced_anew_for_another_placement():
    where, traced = partitioning.make_mesh({}, jax.devices()[:1]), []

    @jax.jit
    def double(x):
        traced.append(partitioning.placement_in_use().name)
        return 2 * x

    double(1.0)
    for placement in (LONG, LONG, TRAIN):
        with partitioning.use(where, placement):
            double(1.0)
            assert partitioning.batch_axes() == (placement.table["batch"], placement.table["time"])
    assert traced == ["train", "long", "train"]  # the first without a mesh
    assert partitioning.placement_in_use() is TRAIN
    assert hash(LONG) == hash(dataclasses.replace(LONG)) and LONG != dataclasses.replace(LONG, aligned=True)


def test_a_size_that_does_not_divide_names_the_sizes_that_would():
    with pytest.raises(
        ValueError, match=r"heads=40 is not divisible by tensor=16; split it 1, 2, 4, 5, 8, 10, 20 or 40"
    ):
        partitioning.spec(("embed", "heads", "head_dim"), (5120, 40, 128), TRAIN, mesh(tensor=16))


def test_one_mesh_axis_cannot_split_two_axes_of_an_array():
    both = Placement("both", {"heads": ("tensor",), "head_dim": ("tensor",)})
    with pytest.raises(
        ValueError, match=r"both 'heads' and 'head_dim' of an array \[heads=8 head_dim=64\] .* tensor=2"
    ):
        partitioning.spec(("heads", "head_dim"), (8, 64), both, mesh(tensor=2))
    assert partitioning.spec(("heads", "head_dim"), (8, 64), both, mesh(data=2)) == PartitionSpec(None, None)


def test_unknown_axes_are_refused_with_what_was_meant():
    with pytest.raises(ValueError, match="logical axis 'expert' is unknown; did you mean 'experts'"):
        Placement("mine", {"expert": ("expert",)})
    with pytest.raises(ValueError, match="mesh axis 'tensors' is unknown; did you mean 'tensor'"):
        Placement("mine", {"mlp": ("tensors",)})
    with pytest.raises(ValueError, match="mesh axis 'fdsp' is unknown; did you mean 'fsdp'"):
        partitioning.make_mesh({"fdsp": 1})


def test_a_mesh_must_use_every_device():
    devices = jax.devices() * 6
    with pytest.raises(ValueError, match="fsdp=4 does not use 6 devices"):
        partitioning.make_mesh({"fsdp": 4}, devices)
    with pytest.raises(ValueError, match="data=-1 x fsdp=-1 does not use 6 devices"):
        partitioning.make_mesh({"data": -1, "fsdp": -1}, devices)


@pytest.mark.parametrize("preset", [presets.scout, presets.maverick, presets.tiny])
def test_every_parameter_names_each_of_its_axes(preset):
    """Stacked layers of the vision tower included."""
    model = jax.eval_shape(lambda: Llama4(preset(), rngs=nnx.Rngs(0)))
    parameters = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param))
    assert all(len(parameter.axes) == len(parameter.shape) for parameter in parameters)
    assert {axis for parameter in parameters for axis in parameter.axes} <= set(partitioning.LOGICAL_AXES)


@pytest.mark.parametrize("preset", [presets.scout, presets.maverick])
def test_every_large_matrix_is_split_over_a_whole_pod(preset):
    model = jax.eval_shape(lambda: Llama4(preset(), rngs=nnx.Rngs(0)))
    places = partitioning.shardings(model, TRAIN, mesh(fsdp=8, expert=16, tensor=8))
    leaves, shards = names.split(model)[1], names.split(places)[1]
    ways = {name: leaf.size // math.prod(shards[name].shard_shape(leaf.shape)) for name, leaf in leaves.items()}
    assert {ways[name] for name in ways if ".experts." in name} == {8 * 16 * 8}
    assert ways["head.kernel"] == ways["embed.table"] == ways["decoder.period.0.attention.query.kernel"] == 8 * 16 * 8


def test_a_parameter_that_does_not_fit_is_named():
    model = jax.eval_shape(lambda: Llama4(presets.tiny(), rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"decoder.period\[0\].attention.key.kernel.*kv_heads=2 is not divisible by tensor=4"
    ):
        partitioning.shardings(model, TRAIN, mesh(tensor=4))
