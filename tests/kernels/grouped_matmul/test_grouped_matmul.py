"""One suite for every implementation of the grouped product: forward and gradients against the specification.

Expected values are computed in float64 by NumPy, group by group, from the inputs as the implementation gets them.
"""

import logging

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from llama4_jax.kernels.grouped_matmul import api, blocked, grouped_matmul, workloads
from llama4_jax.testing import budget

STACKED = sorted(api.IMPLEMENTATIONS)
# An interpreted kernel takes seconds to compile: one of each way in which groups and tiles of rows can meet.
TILED = ("uneven", "empty groups", "every block size", "rows of no group", "no rows")
CASES = [(each, name) for each in STACKED for name in workloads.SMALL if each != "megablox" or name in TILED]
DTYPES = [jnp.float32, jnp.bfloat16]
CASES = [(*case, jnp.float32) for case in CASES] + [
    pytest.param(*case, jnp.bfloat16, marks=() if case[1] == "uneven" else pytest.mark.thorough) for case in CASES
]


def in_groups(group_sizes):
    """(group, its rows as a slice) for each group."""
    ends = np.cumsum(np.asarray(group_sizes))
    return [(i, slice(end - size, end)) for i, (size, end) in enumerate(zip(np.asarray(group_sizes), ends))]


def expected(lhs, rhs, group_sizes, cotangent):
    """Output, d lhs, d rhs in float64."""
    lhs, rhs, cotangent = (np.asarray(x, np.float64) for x in (lhs, rhs, cotangent))
    results = np.zeros_like(cotangent), np.zeros_like(lhs), np.zeros_like(rhs)
    for i, rows in in_groups(group_sizes):
        results[0][rows] = lhs[rows] @ rhs[i]
        results[1][rows] = cotangent[rows] @ rhs[i].T
        results[2][i] = lhs[rows].T @ cotangent[rows]
    return results


def computed(implementation, lhs, rhs, group_sizes, cotangent, **options):
    """The same by an implementation, compiled."""

    @jax.jit
    def run(lhs, rhs, group_sizes, cotangent):
        def product(lhs, rhs):
            return grouped_matmul(lhs, rhs, group_sizes, implementation=implementation, **options)

        out, backward = jax.vjp(product, lhs, rhs)
        return out, *backward(cotangent)

    return run(lhs, rhs, group_sizes, cotangent)


def assert_close(got, want, lhs, rhs, group_sizes, cotangent):
    """Each result within its own budget, whose magnitude is the same product of absolute values."""
    longest = max(1, int(np.max(np.asarray(group_sizes))))
    lengths = rhs.shape[1], rhs.shape[2], longest
    sizes = expected(*(jnp.abs(x) for x in (lhs, rhs)), group_sizes, jnp.abs(cotangent))
    for name, x, y, length, size in zip(("output", "d lhs", "d rhs"), got, want, lengths, sizes):
        assert x.dtype == lhs.dtype and x.shape == y.shape, name
        tolerance = budget.matmul_tolerance(lhs.dtype, length, float(size.max(initial=0.0)))
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation, name, dtype", CASES)
def test_output_and_gradients_equal_the_groups_own_products(implementation, name, dtype):
    arrays = workloads.SMALL[name].arrays(seed=0, dtype=dtype)
    assert_close(computed(implementation, *arrays), expected(*arrays), *arrays)


@pytest.mark.parametrize("implementation", STACKED)
def test_rows_past_the_groups_are_exactly_zero_and_get_no_gradient(implementation):
    workload = workloads.SMALL["rows of no group"]
    out, d_lhs, d_rhs = computed(implementation, *workload.arrays(seed=1))
    used = sum(workload.group_sizes)
    assert not np.any(out[used:]) and not np.any(d_lhs[used:])
    assert not np.any(d_rhs[1]), "an empty group's matrix has a gradient"


@pytest.mark.parametrize(
    "implementation", ["blocked", "megablox", "ragged"]
)  # the reference multiplies by masks of zeros
def test_rows_that_are_not_finite_spoil_no_other_group(implementation):
    lhs, rhs, group_sizes, cotangent = workloads.SMALL["uneven"].arrays(seed=2)
    lhs = lhs.at[20:23].set(jnp.inf)  # the second group's rows
    out, _, d_rhs = computed(implementation, lhs, rhs, group_sizes, cotangent)
    assert np.all(np.isfinite(out[:20])) and np.all(np.isfinite(out[23:]))
    assert np.all(np.isfinite(d_rhs[0])) and np.all(np.isfinite(d_rhs[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["uneven", "empty groups", "one row"])
@pytest.mark.parametrize("implementation", STACKED)
def test_transposed_matrices_give_what_the_matrices_give(implementation, name, dtype):
    lhs, rhs, group_sizes, cotangent = arrays = workloads.SMALL[name].arrays(seed=3, dtype=dtype)
    got = computed(implementation, lhs, rhs.swapaxes(1, 2), group_sizes, cotangent, transpose_rhs=True)
    assert_close((*got[:2], got[2].swapaxes(1, 2)), expected(*arrays), *arrays)


@pytest.mark.parametrize("implementation", STACKED)
def test_gradients_pass_through_a_scan_over_layers(implementation):
    lhs, rhs, _, cotangent = workloads.Workload(rows=21, inputs=8, outputs=8, group_sizes=(21, 0, 0)).arrays(seed=4)
    layers = jnp.stack([rhs, -rhs[::-1]])
    sizes = jnp.array([[9, 0, 12], [0, 20, 1]], jnp.int32)

    def scanned(lhs, layers, implementation):
        def layer(x, weights_and_sizes):
            return jnp.tanh(grouped_matmul(x, *weights_and_sizes, implementation=implementation) / 4), None

        return jnp.vdot(jax.lax.scan(layer, lhs, (layers, sizes))[0], cotangent)

    got = jax.jit(jax.grad(scanned, (0, 1)), static_argnums=2)(lhs, layers, implementation)
    want = lhs, layers
    for i in range(2):  # tanh' <= 1 and a quarter of 8 standard normal weights hardly grow the error of one layer
        exact = jax.grad(unrolled, (0, 1))(lhs, layers, sizes, cotangent)[i]
        assert got[i].shape == want[i].shape
        np.testing.assert_allclose(got[i], exact, rtol=0, atol=2 * budget.matmul_tolerance(jnp.float32, 8 + 21, 100.0))


def unrolled(lhs, layers, sizes, cotangent):
    """The scan's sum with each row multiplied by its own matrix, fetched one by one."""
    for matrices, counts in zip(layers, sizes):
        group = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(lhs))
        lhs = jnp.tanh(jnp.stack([row @ matrices[g] for row, g in zip(lhs, group)]) / 4)
    return jnp.vdot(lhs, cotangent)


# Only group sizes vary, so that one compilation serves all examples.
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(cuts=strategies.lists(strategies.integers(0, 200), min_size=5, max_size=5))
def test_any_group_sizes_give_the_groups_own_products(cuts):
    cuts = sorted(cuts)
    sizes = tuple(np.diff([0, *cuts]))  # five groups, and the rest of 200 rows belongs to none
    lhs, rhs, _, cotangent = workloads.Workload(rows=200, inputs=8, outputs=12, group_sizes=sizes).arrays(seed=5)
    arrays = lhs, rhs, jnp.array(sizes, jnp.int32), cotangent
    assert_close(_blocked(*arrays), expected(*arrays), *arrays)


@jax.jit
def _blocked(lhs, rhs, group_sizes, cotangent):
    out, backward = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, group_sizes, implementation="blocked"), lhs, rhs)
    return out, *backward(cotangent)


def test_temporary_memory_does_not_grow_with_the_number_of_groups():
    def temporary(groups, dtype):
        shapes = ((256, 64), dtype), ((groups, 64, 128), dtype), ((groups,), jnp.int32)
        call = jax.jit(lambda *args: grouped_matmul(*args, implementation="blocked"))
        compiled = call.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for dtype in DTYPES:  # in bfloat16, a slice that converts its whole array first would show here
        matrix = 64 * 128 * 4
        assert temporary(64, dtype) - temporary(4, dtype) < matrix


@pytest.mark.parametrize(
    ("rows", "groups", "sizes"),
    [(8192, 4, (128,)), (8192, 64, (128, 32)), (1024, 128, (128, 32, 16, 4)), (8, 8, (4, 1)), (3, 1, (1,))],
)
def test_blocks_fit_the_rows_and_are_not_too_short_to_pay(rows, groups, sizes):
    assert blocked._block_sizes((128, 32, 16, 4, 1), rows, groups) == sizes


def test_the_platform_chooses_and_says_so_once(caplog):
    api.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger=api.__name__):
        chosen = [api.choose(*case) for case in (("cpu", 4), ("cpu", 4), ("tpu", 4), ("tpu", 1), ("gpu", 4))]
    assert chosen == ["blocked", "blocked", "megablox", "ragged", "ragged"]
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_matmul of 4 groups on cpu runs as 'blocked'",
        "grouped_matmul of 4 groups on tpu runs as 'megablox'",
        "grouped_matmul of 1 groups on tpu runs as 'ragged'",
        "grouped_matmul of 4 groups on gpu runs as 'ragged'",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "implementation='fast' is unknown.*'blocked', 'megablox', 'ragged', 'reference'"),
        ({"lhs": jnp.ones((4, 3))}, r"got lhs \[4, 3\] and rhs \[2, 5, 6\]"),
        ({"lhs": jnp.ones((1, 4, 5))}, "flatten tokens to rows"),
        ({"rhs": jnp.ones((5, 6))}, "wants lhs"),
        ({"transpose_rhs": True}, r"rhs \[e n k\]; got lhs \[4, 5\] and rhs \[2, 5, 6\]"),
        ({"group_sizes": jnp.array([4, 0, 0])}, r"integers \[e=2\].*got int32\[3\]"),
        ({"group_sizes": jnp.array([4.0, 0.0])}, r"got float32\[2\]"),
        ({"lhs": jnp.ones((4, 5), jnp.bfloat16)}, "share a floating dtype; got bfloat16 and float32"),
        ({"lhs": jnp.ones((4, 5), int), "rhs": jnp.ones((2, 5, 6), int)}, "share a floating dtype"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"lhs": jnp.ones((4, 5)), "rhs": jnp.ones((2, 5, 6)), "group_sizes": jnp.array([1, 3])} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments)


def test_a_dtype_that_the_kernel_does_not_know_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="got float16; cast"):
        grouped_matmul(
            jnp.ones((4, 5), "float16"), jnp.ones((2, 5, 6), "float16"), jnp.array([1, 3]), implementation="megablox"
        )
