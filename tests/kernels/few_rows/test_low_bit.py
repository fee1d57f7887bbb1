"""Few rows times packed matrices of few bits: the compiled library against exact arithmetic with what the bits stand for."""

import ctypes
import dataclasses
import functools
import platform

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import few_rows
from llama4_jax.kernels.few_rows import native
from llama4_jax.testing import budget

ROWS = (1, 3, 9, few_rows.FEW_ROWS + 1)  # the last are multiplied by XLA
# Inputs and outputs on both sides of a block of 32, of matrix rows that are read together, and of a thread's piece.
FORMS = [  # values, offsets, k, n, groups
    ("int4", False, 48, 33, 3),
    ("int4", False, 640, 401, 5),
    ("int4", True, 96, 5, 1),
    ("int8", False, 48, 6, 1),
    ("int8", True, 128, 30, 4),
    ("float8_e4m3fn", False, 96, 7, 2),
]
FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))


def drawn(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight_of(values, offsets, k, n, groups, *leading, seed=1) -> QuantizedArray:
    """[leading k n], of every number that `values` has, and as many scales as groups."""
    rng, kinds = np.random.default_rng(seed), {"int4": (-8, 8), "int8": (-128, 128), "float8_e4m3fn": (0, 256)}
    drawn = rng.integers(*kinds[values], (*leading, k, n))
    if values == "float8_e4m3fn":
        drawn = drawn.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        drawn = np.where(np.isnan(drawn.astype(np.float32)), np.zeros_like(drawn), drawn)
    scales = rng.uniform(0.01, 1.0, (*leading, groups, n)).astype(ml_dtypes.bfloat16)
    shifts = rng.integers(*kinds["int4"], scales.shape).astype(ml_dtypes.bfloat16) if offsets else None
    return jax.tree.map(jnp.asarray, QuantizedArray(drawn.astype(values), scales, shifts))


def exact(rows, weight):
    """The product in float64, and the sums of the magnitudes in it, of values and of offsets."""
    rows, values = (np.asarray(array, np.float64) for array in (rows, weight.values.astype(jnp.float32)))

    def spread(part):
        return np.repeat(np.asarray(part, np.float64), len(values) // len(part), axis=0)

    scales, offsets = spread(weight.scales), 0 if weight.offsets is None else spread(weight.offsets)
    return rows @ ((values - offsets) * scales), np.abs(rows) @ ((np.abs(values) + np.abs(offsets)) * scales)


def assert_near(got, rows, weight):
    wanted, sizes = exact(rows, weight)
    allowed = budget.matmul_tolerance(jnp.float32, weight.shape[0]) * sizes
    assert (np.abs(np.asarray(got, np.float64) - wanted) <= allowed).all()


@functools.partial(jax.jit, static_argnames="activations")
def products(weight, lefts, activations=None):
    packed = few_rows.pack(weight, 1)
    return packed, packed.unpack(), [few_rows.multiply(left, packed, activations) for left in lefts]


@FORM
def test_products_equal_those_of_exact_arithmetic_and_unpacking_gives_every_bit(form):
    assert native.available()
    weight, lefts = weight_of(*form), [drawn(rows, form[2], seed=rows) for rows in ROWS]
    packed, unpacked, found = products(weight, lefts)
    np.testing.assert_array_equal(unpacked, np.asarray(weight.dequantize()).T)
    assert packed.shape == unpacked.shape and packed.values.dtype == jnp.uint8
    for left, got in zip(lefts, found):
        assert got.dtype == jnp.float32
        assert_near(got, left, weight)


@FORM
def test_rounded_rows_are_multiplied_as_what_they_stand_for(form):
    activations = "int8" if form[0] != "float8_e4m3fn" else form[0]
    weight = weight_of(*form)
    lefts = [
        drawn(rows, form[2], seed=rows) * 10.0 ** drawn(rows, 1, seed=4) for rows in ROWS
    ]  # rows of different sizes
    for left, got in zip(lefts, products(weight, lefts, activations)[2]):
        scales = np.abs(left).max(1, keepdims=True) / quantized.largest(activations)
        rounded = np.asarray(jnp.asarray(left / scales).astype(activations).astype(jnp.float32))
        rounded = np.round(left / scales) if activations == "int8" else rounded
        assert_near(got, rounded.astype(np.float64) * scales, weight)


def test_two_int4_take_a_byte_and_what_they_stand_for_is_known():
    weight = weight_of("int4", False, 256, 4, 2)
    packed = few_rows.pack(dataclasses.replace(weight, dtype="bfloat16", activations="int8"), 1)
    assert packed.values.nbytes == 256 * 4 / 2 and packed.scales.shape == (4, 2)
    assert packed.dtype == "bfloat16" and packed.activations == "int8"


def test_floats_in_which_few_bits_are_trained_are_not_packed():
    weight = weight_of("int4", False, 32, 4, 2)
    assert few_rows.can_pack(weight)
    assert not few_rows.can_pack(dataclasses.replace(weight, values=weight.values.astype(jnp.float32)))


@pytest.mark.parametrize("groups", [(8, 8), (8, 2), (8, 1), (2, 1), (1, 1)], ids=str)
def test_groups_within_and_across_heads_are_those_of_the_flat_inputs(groups):
    flat = weight_of("int8", True, 64, 6, groups[0] * groups[1])
    parts = (part.reshape(*groups, 2, 3) for part in (flat.scales, flat.offsets))
    heads = QuantizedArray(flat.values.reshape(8, 8, 2, 3), *parts)
    for got, wanted in zip(jax.tree.leaves(few_rows.pack(heads, 2)), jax.tree.leaves(few_rows.pack(flat, 1))):
        np.testing.assert_array_equal(got, wanted)


def test_scales_that_successive_inputs_do_not_share_are_refused():
    odd = QuantizedArray(jnp.zeros((8, 8, 5), jnp.int8), jnp.ones((1, 2, 5)))
    with pytest.raises(ValueError, match="not those of successive inputs"):
        few_rows.pack(odd, 2)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_each_row_meets_its_own_groups_matrix_and_rows_of_none_give_zero(activations):
    stack, rows = weight_of("int4", True, 48, 40, 3, 4), drawn(14, 48, seed=2)
    run = jax.jit(lambda rows, sizes: few_rows.grouped(rows, few_rows.pack(stack, 1, leading=1), sizes, activations))
    scales = np.abs(rows).max(1, keepdims=True) / 127
    meant = np.round(rows / scales) * scales if activations else rows
    for sizes in [(8, 0, 0, 6), (0, 3, 0, 5), (0, 0, 0, 0), (2, 0, 9, 1)]:
        got, ends = run(rows, jnp.array(sizes, jnp.int32)), np.cumsum(sizes)
        for group, (start, end) in enumerate(zip(ends - sizes, ends)):
            assert_near(got[start:end], meant[start:end], jax.tree.map(lambda part, group=group: part[group], stack))
        assert not np.any(got[ends[-1] :])


def test_the_gradient_in_rows_is_that_of_the_dequantised_matrices():
    """Rounding passes it on."""
    stack, rows = weight_of("int4", False, 48, 20, 3, 3), drawn(6, 48, seed=4)
    sizes, group, cotangent = jnp.array([2, 0, 3], jnp.int32), np.array([0, 0, 2, 2, 2]), drawn(6, 20, seed=6)

    @jax.jit
    def gradients(rows):
        def pull(activations):
            product = lambda rows: few_rows.grouped(rows, few_rows.pack(stack, 1, leading=1), sizes, activations)  # noqa: E731
            return jax.vjp(product, rows)[1](cotangent)[0]

        return pull(None), pull("int8")

    wanted = np.einsum("mn,mkn->mk", cotangent[:5], np.asarray(stack.dequantize())[group])
    for got in gradients(rows):
        np.testing.assert_allclose(got[:5], wanted, rtol=0, atol=1e-4)
        assert not np.any(got[5])


def test_large_products_are_shared_by_threads_and_give_the_same_bits_again():
    packed, rows = few_rows.pack(weight_of("int4", False, 512, 4096, 4), 1), drawn(7, 512, seed=7)
    run = jax.jit(lambda rows: [few_rows.multiply(rows, packed, activations) for activations in (None, "int8")])
    first = run(rows)
    for _ in range(20):
        assert all(map(np.array_equal, run(rows), first))


@pytest.mark.parametrize("width", [128, 80])  # 80 inputs are two groups of a block each, and 16 too many
def test_what_does_not_belong_together_is_an_error(width):
    assert native.available()
    packed = few_rows.pack(weight_of("int8", False, 64, 8, 2), 1)
    with pytest.raises(Exception, match="do not belong together"):
        native.low_bit(jnp.ones((1, width)), packed[None], jnp.array([1])).block_until_ready()


def test_only_few_rows_on_a_cpu_go_to_the_library_and_rounded_ones_as_integers(monkeypatch):
    packed = few_rows.pack(weight_of("int4", False, 32, 8, 1), 1)

    def lowered(rows, activations=None):
        rows = jax.ShapeDtypeStruct((rows, 32), jnp.float32)
        return jax.jit(lambda x: few_rows.multiply(x, packed, activations)).lower(rows).as_text()

    assert "few_rows_int4" in lowered(few_rows.FEW_ROWS) and "few_rows_int4" not in lowered(few_rows.FEW_ROWS + 1)
    assert "few_rows_int4_int8" in lowered(1, "int8")
    monkeypatch.setattr(native, "available", lambda: False)
    assert "few_rows" not in lowered(1)


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_what_is_compiled_for_lesser_processors_gives_the_same(processor, monkeypatch, tmp_path):
    """No AVX, and AVX2 without products of bytes; a processor that has more runs both."""
    assert native.available()  # under their own names first
    options = [option for option in native._OPTIONS if not option.startswith("-march")]
    monkeypatch.setattr(native, "_OPTIONS", (*options, f"-march={processor}"))
    library = ctypes.CDLL(str(native.build(tmp_path)))
    for table in ("LOW_BIT", "LOW_BIT_ROWS"):
        renamed = {key: f"{name}_{processor}" for key, name in getattr(native, table).items()}
        for key, name in getattr(native, table).items():
            jax.ffi.register_ffi_target(renamed[key], jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        monkeypatch.setattr(native, table, renamed)
    products.clear_cache()  # of programs that call the others
    for form in FORMS:
        test_products_equal_those_of_exact_arithmetic_and_unpacking_gives_every_bit(form)
        test_rounded_rows_are_multiplied_as_what_they_stand_for(form)
    products.clear_cache()
