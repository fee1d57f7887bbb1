"""Few rows times matrices, most of them transposed: the compiled library against exact arithmetic, and XLA where it does not serve."""

import logging
import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels import few_rows
from llama4_jax.kernels.few_rows import api, native
from llama4_jax.testing import budget

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
# Inputs and outputs on both sides of a vector of 16 lanes and of four of them, and of a thread's piece of a matrix.
SHAPES = [(5, 3), (48, 33), (64, 64), (129, 1), (1000, 301)]


def drawn(*shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_near(got, rows, matrix, dtype):
    rows, matrix = np.asarray(rows, np.float64), np.asarray(matrix, np.float64)
    tolerance = budget.matmul_tolerance(dtype, rows.shape[1], np.max(np.abs(rows) @ np.abs(matrix).T, initial=0.0))
    np.testing.assert_allclose(np.asarray(got, np.float64), rows @ matrix.T, rtol=0, atol=tolerance)


def test_the_library_is_here():  # all others would pass without it
    assert native.available()


@DTYPES
@pytest.mark.parametrize("rows", range(1, few_rows.FEW_ROWS + 2))
def test_product_equals_that_of_exact_arithmetic(rows, dtype):
    for k, n in SHAPES:
        left, right = drawn(rows, k, dtype=dtype, seed=0), drawn(n, k, dtype=dtype, seed=1)
        got = few_rows.multiply(left, right)
        assert got.dtype == jnp.float32 and got.shape == (rows, n)
        assert_near(got, left, right, jnp.float32)


@DTYPES
@pytest.mark.parametrize("sizes", [(8,), (1, 1, 6), (0, 3, 0, 5), (0, 0, 4), (0, 0), (2, 0, 9, 1)])
def test_each_row_meets_its_own_groups_matrix_and_rows_of_none_give_zero(sizes, dtype):
    rows, matrices = drawn(14, 48, dtype=dtype, seed=2), drawn(len(sizes), 40, 48, dtype=dtype, seed=3)
    got = jax.jit(few_rows.grouped)(rows, matrices, jnp.array(sizes, jnp.int32))
    assert got.dtype == dtype
    ends = np.cumsum(sizes)
    for start, end, matrix in zip(ends - sizes, ends, matrices):
        assert_near(got[start:end], rows[start:end], matrix, dtype)
    assert not np.any(got[ends[-1] :])


@DTYPES
@pytest.mark.parametrize("m", [1, 4, 9])
def test_each_group_of_equal_size_meets_its_own_matrix(m, dtype):
    rows, matrices = drawn(5, m, 20, dtype=dtype, seed=8), drawn(5, 33, 20, dtype=dtype, seed=9)
    got = jax.jit(few_rows.each)(rows, matrices)
    assert got.dtype == jnp.float32 and got.shape == (5, m, 33)
    for product, left, right in zip(got, rows, matrices):
        assert_near(product, left, right, jnp.float32)


def test_groups_of_many_rows_are_left_to_xla():
    rows = jnp.zeros((2, few_rows.FEW_ROWS + 1, 8))
    assert few_rows.each(rows, jnp.zeros((2, 3, 8))) is None
    assert few_rows.each(rows[:, 1:], jnp.zeros((2, 3, 8), jnp.bfloat16)) is None


@DTYPES
@pytest.mark.parametrize("m", [1, 4, 9])
def test_each_group_meets_its_own_matrix_as_it_is(m, dtype):
    for k, n in SHAPES:
        rows, matrices = drawn(3, m, k, dtype=jnp.float32, seed=8), drawn(3, k, n, dtype=dtype, seed=9)
        got = jax.jit(few_rows.each_plain)(rows, matrices)
        assert got.dtype == jnp.float32 and got.shape == (3, m, n)
        for product, left, right in zip(got, rows, matrices):
            assert_near(product, left, right.T, jnp.float32)


@DTYPES
def test_gradients_of_groups_as_they_are_equal_those_of_xlas_products(dtype):
    rows, matrices = drawn(3, 4, 20, dtype=jnp.float32, seed=8), drawn(3, 20, 33, dtype=dtype, seed=9)
    cotangent = drawn(3, 4, 33, dtype=jnp.float32, seed=10)
    got = jax.vjp(few_rows.each_plain, rows, matrices)[1](cotangent)
    assert got[1].dtype == dtype
    for g in range(3):
        assert_near(got[0][g], cotangent[g], matrices[g], jnp.float32)
        assert_near(got[1][g], rows[g].T, cotangent[g].T, dtype)


def test_groups_that_are_not_known_as_they_are_are_left_to_xla():
    rows, matrices = jnp.zeros((2, few_rows.FEW_ROWS + 1, 8)), jnp.zeros((2, 8, 3))
    assert few_rows.each_plain(rows, matrices) is None
    assert few_rows.each_plain(rows[:, 1:].astype(jnp.bfloat16), matrices) is None
    assert few_rows.each_plain(rows[:, 1:], matrices.astype(jnp.int8)) is None


@DTYPES
def test_gradients_equal_those_of_plain_products(dtype):
    rows, matrices = drawn(6, 48, dtype=dtype, seed=4), drawn(3, 20, 48, dtype=dtype, seed=5)
    sizes, group = jnp.array([2, 0, 3], jnp.int32), np.array([0, 0, 2, 2, 2])
    cotangent = drawn(6, 20, dtype=dtype, seed=6)
    got = jax.vjp(lambda rows, matrices: few_rows.grouped(rows, matrices, sizes), rows, matrices)[1](cotangent)
    for i in range(5):
        assert_near(got[0][i : i + 1], cotangent[i : i + 1], matrices[group[i]].T, dtype)
    for g, some in ((0, slice(0, 2)), (2, slice(2, 5))):
        assert_near(got[1][g], cotangent[some].T, rows[some].T, dtype)
    assert not np.any(got[0][5]) and not np.any(got[1][1])


def test_large_products_are_shared_by_threads_and_give_the_same_bits_again():
    rows, matrices = drawn(7, 512, dtype=jnp.float32, seed=7), drawn(4, 2048, 512, dtype=jnp.float32, seed=8)
    run, sizes = jax.jit(few_rows.grouped), jnp.array([3, 0, 1, 3], jnp.int32)
    first = run(rows, matrices, sizes)
    assert all(np.array_equal(run(rows, matrices, sizes), first) for _ in range(20))


def test_more_rows_in_groups_than_there_are_is_an_error():
    with pytest.raises(Exception, match="group_sizes add up to more rows than there are"):
        few_rows.grouped(jnp.ones((2, 8)), jnp.ones((1, 4, 8)), jnp.array([3])).block_until_ready()


def test_without_the_library_xla_gives_the_same(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    for dtype in (jnp.float32, jnp.bfloat16):
        rows, matrix = drawn(1, 48, dtype=dtype, seed=9), drawn(33, 48, dtype=dtype, seed=10)
        lowered = jax.jit(lambda rows, matrix: few_rows.multiply(rows, matrix)).lower(rows, matrix)
        assert "few_rows_" not in lowered.as_text()
        assert_near(lowered.compile()(rows, matrix), rows, matrix, jnp.float32)


def test_only_few_rows_on_a_cpu_go_to_the_library():
    def calls(rows):
        abstract = jax.ShapeDtypeStruct((rows, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
        return "few_rows_float32" in jax.jit(api.multiply).lower(*abstract).as_text()

    assert calls(few_rows.FEW_ROWS) and not calls(few_rows.FEW_ROWS + 1)


def test_a_machine_without_a_compiler_is_told_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(native.pathlib.Path, "home", lambda: tmp_path)
    native.available.cache_clear()
    with caplog.at_level(logging.WARNING, logger=native.__name__):
        assert not native.available() and not native.available()
    assert len(caplog.records) == 1 and "no-such-compiler; install one, such as g++" in caplog.text
    native.available.cache_clear()


def test_what_the_compiler_refuses_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    refuses = tmp_path / "refuses"
    refuses.write_text("#!/bin/sh\necho 'unknown processor' >&2\nexit 1\n")
    refuses.chmod(refuses.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(native, "_COMPILERS", ("refuses",))
    with pytest.raises(RuntimeError, match=re.escape("few_rows.cc") + "(.|\n)*unknown processor"):
        native.build(tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())
