"""The kernels for GPUs, in Pallas' interpreter and as far as they are made without a compiler for GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.kernels.int4_matmul import triton, workloads
from llama4_jax.testing import low_bit


@pytest.mark.parametrize("name", ["odd groups, ragged outputs", "rounded rows, small groups", "large groups", "int8"])
def test_a_product_equals_the_reference(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        x, weight = workloads.SMALL[name].arrays(0, dtype)
        low_bit.check(triton.matmul(x, weight, interpret=True), x, weight)


@pytest.mark.parametrize("name", workloads.SMALL_GROUPED)
def test_a_product_with_many_matrices_equals_the_reference(name):
    arrays = workloads.SMALL_GROUPED[name].arrays(0, jnp.bfloat16)
    low_bit.check(triton.grouped(*arrays, interpret=True), *arrays)


@pytest.mark.parametrize(
    ("product", "workload"),
    [
        (triton.matmul, workloads.layers(32, workloads.OFFSETS)["down"]),
        (triton.grouped, workloads.experts(32, workloads.OFFSETS)),
    ],
    ids=["one matrix", "experts"],
)
def test_a_product_of_scout_is_lowered_to_one_triton_kernel(product, workload):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        program = jax.jit(product).trace(*workload.shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @__gpu$xla.gpu.triton") == 1


def test_groups_too_small_for_tensor_cores_are_refused():
    x = jnp.zeros((4, 24))
    weight = quantized.quantize(jnp.ones((24, 8)), QuantSpec(group=8), (0,))
    with pytest.raises(NotImplementedError, match="groups of 8 inputs, only multiples of 16"):
        triton.matmul(x, weight)
