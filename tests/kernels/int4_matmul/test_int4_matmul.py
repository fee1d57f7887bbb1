"""Products with few-bit weights on a CPU: against NumPy in float64, forward and gradient; and what is refused."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.kernels import int4_matmul
from llama4_jax.kernels.grouped_matmul import grouped_matmul
from llama4_jax.kernels.int4_matmul import api, workloads
from llama4_jax.testing import low_bit

FLOAT8 = QuantSpec(values="float8_e4m3fn", group=None, activations="float8_e4m3fn")


def product(*arrays, implementation=None):
    call = int4_matmul.matmul if len(arrays) == 2 else int4_matmul.grouped
    return call(*arrays, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["odd groups, ragged outputs", "rounded rows, offsets", "uneven", "rows of no group"])
def test_products_keep_to_the_budget_in_both_dtypes(implementation, name):
    workload = (workloads.SMALL | workloads.SMALL_GROUPED)[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = workload.arrays(0, dtype)
        low_bit.check(product(*arrays, implementation=implementation), *arrays)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_of_bfloat16_may_give_float32_and_get_gradients_of_bfloat16(implementation):
    x, weight = workloads.SMALL["rounded rows"].arrays(0, jnp.bfloat16)
    call = lambda x: int4_matmul.matmul(x, weight, dtype=jnp.float32, implementation=implementation)  # noqa: E731
    out, pull = jax.vjp(call, x)
    assert out.dtype == jnp.float32 and np.any(out != out.astype(jnp.bfloat16).astype(jnp.float32))
    low_bit.check(out.astype(jnp.bfloat16), x, weight)
    assert pull(out)[0].dtype == jnp.bfloat16


def test_float8_weights_and_rows_are_multiplied():
    arrays = dataclasses.replace(workloads.SMALL["a scale an output"], spec=FLOAT8).arrays(0)
    low_bit.check(product(*arrays), *arrays)


def test_in_float32_a_product_is_bit_for_bit_that_with_the_dequantised_weight():
    x, weight = workloads.SMALL["rounded rows, offsets"].arrays(0)
    plain = jnp.tensordot(int4_matmul.rounded(x, "int8"), weight.dequantize(), 1)
    np.testing.assert_array_equal(int4_matmul.matmul(x, weight), plain)
    x, weight, sizes = workloads.SMALL_GROUPED["uneven"].arrays(0)
    np.testing.assert_array_equal(int4_matmul.grouped(x, weight, sizes), grouped_matmul(x, weight.dequantize(), sizes))


def test_outputs_may_have_several_axes():
    x = jax.random.normal(jax.random.key(0), (3, 64))
    weight = quantized.quantize(jax.random.normal(jax.random.key(1), (64, 2, 8)), QuantSpec(group=32), (0,))
    low_bit.check(int4_matmul.matmul(x, weight), x, weight)


@pytest.mark.parametrize("name", ["rounded rows", "rows of no group"])
def test_gradient_in_x_is_the_transposed_product_and_passes_through_rounding(name):
    x, weight, *sizes = (workloads.SMALL | workloads.SMALL_GROUPED)[name].arrays(0)
    out, pull = jax.vjp(lambda x: product(x, weight, *sizes), x)
    cotangent = jax.random.normal(jax.random.key(1), out.shape)
    turned = jnp.swapaxes(weight.dequantize(), -1, -2)
    wanted = grouped_matmul(cotangent, turned, *sizes) if sizes else cotangent @ turned
    np.testing.assert_allclose(pull(cotangent)[0], wanted, rtol=1e-5, atol=1e-4)


def test_values_in_training_give_the_same_bits_and_get_gradients_with_their_scales():
    x, weight = workloads.SMALL["offsets"].arrays(0)
    trained = dataclasses.replace(weight, values=weight.values.astype(jnp.float32))
    np.testing.assert_array_equal(int4_matmul.matmul(x, trained), int4_matmul.matmul(x, weight))
    gradient = jax.grad(lambda weight: int4_matmul.matmul(x, weight).sum())(trained)
    scales = quantized.spread(weight.scales, weight.shape).astype(jnp.float32)
    np.testing.assert_allclose(gradient.values, x.sum(0)[:, None] * scales, rtol=1e-5, atol=1e-5)
    assert np.count_nonzero(gradient.scales) > 0.9 * gradient.scales.size


def test_no_rows_give_no_rows():
    _, weight, sizes = workloads.SMALL_GROUPED["no groups' rows"].arrays(0)
    assert int4_matmul.grouped(jnp.zeros((0, 128)), weight, sizes).shape == (0, 200)


def test_the_kernel_is_taken_on_a_tpu_and_what_it_cannot_do_is_said(caplog):
    api.choose.cache_clear()
    with caplog.at_level(logging.INFO):
        assert api.choose("tpu", None) == "pallas_tpu"
        assert api.choose("tpu", "groups of 5 inputs") == "xla"
        assert api.choose("cpu", None) == "xla"
    assert "no kernel does groups of 5 inputs" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, weight: (x[0], weight), "flatten tokens to rows"),
        (lambda x, weight: (x[:, :64], weight), "check that k agrees"),
        (lambda x, weight: (x, weight.dequantize()), "use a plain product"),
        (lambda x, weight: (x.astype(jnp.float16), weight), "wanted bfloat16 or float32"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        int4_matmul.matmul(*change(*workloads.SMALL["one row"].arrays(0)))


def test_groups_that_fill_no_register_are_refused_by_kernels():
    x = jnp.zeros((4, 20))
    weight = quantized.quantize(jnp.ones((20, 8)), QuantSpec(group=5), (0,))
    with pytest.raises(NotImplementedError, match="groups of 5 inputs"):
        int4_matmul.matmul(x, weight, implementation="pallas_tpu")
