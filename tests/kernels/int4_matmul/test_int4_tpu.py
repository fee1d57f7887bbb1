"""The kernels for TPUs in JAX's interpreter of them, on two cores: within the budget, and without races but on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llama4_jax.kernels.int4_matmul import blocks, steps, tpu, workloads
from llama4_jax.kernels.int4_matmul.operands import Operands
from llama4_jax.kernels.int4_matmul.tpu import Kernel
from llama4_jax.testing import low_bit

# The interpreter takes a second or more a case: one for each way through the kernels.
PLAIN = {
    "odd groups, ragged outputs": jnp.bfloat16,
    "a scale an output": jnp.float32,  # more inputs than are multiplied at a time
    "rounded rows, offsets": jnp.float32,  # whose budget is far below what rounding to int8 changes
    "rounded rows, small groups": jnp.float32,
}
GROUPED = {"uneven": jnp.bfloat16, "rows of no group": jnp.float32}
MORE = [(name, dtype) for name in workloads.SMALL | workloads.SMALL_GROUPED for dtype in (jnp.float32, jnp.bfloat16)]


@pytest.fixture
def races(capfd, caplog):
    """Interprets kernels, and counts the races that were reported so far."""
    # Newer interpreters raise at the first race unless told otherwise.
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    warn = {"on_race": "warn"} if "on_race" in fields else {}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, **warn)):
        yield lambda: (capfd.readouterr().out + caplog.text).count("RACE DETECTED")


@pytest.mark.parametrize("name", PLAIN)
def test_a_product_equals_the_reference_without_races(races, name):
    x, weight = workloads.SMALL[name].arrays(0, PLAIN[name])
    low_bit.check(tpu.matmul(x, weight, columns=128), x, weight)
    assert races() == 0


def test_rows_of_bfloat16_give_float32_as_exact_as_rows_of_float32(races):
    x, weight = workloads.SMALL["odd groups, ragged outputs"].arrays(0, jnp.bfloat16)
    low_bit.check(tpu.matmul(x, weight, dtype=jnp.float32, columns=256), x.astype(jnp.float32), weight)
    assert races() == 0


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_share_blocks_of_rows_equal_the_reference_without_races(races, name):
    x, weight, sizes = workloads.SMALL_GROUPED[name].arrays(0, GROUPED[name])
    out = grouped_in(x, weight, sizes, rows=32, columns=128, semantics=("parallel", "arbitrary"))
    low_bit.check(out, x, weight, sizes)
    assert races() == 0


def grouped_in(x, weight, sizes, **how):
    operands = Operands.make(x, weight, leading=1, int8=True)
    return jax.block_until_ready(tpu.multiply_grouped(Kernel(**how), operands, sizes, x.dtype))


def test_cores_that_share_a_block_race(races):
    """The negative control: what the detector says of the kernel means something only because of this."""
    x, weight, sizes = workloads.SMALL_GROUPED["uneven"].arrays(0)
    grouped_in(x, weight, sizes, rows=64, columns=256, semantics=("parallel", "parallel"))  # one block, a step a group
    assert races() > 0


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "dtype"), MORE)
def test_every_workload_equals_the_reference_without_races(races, name, dtype):
    arrays = (workloads.SMALL | workloads.SMALL_GROUPED)[name].arrays(1, dtype)
    low_bit.check((tpu.matmul if len(arrays) == 2 else tpu.grouped)(*arrays), *arrays)
    assert races() == 0


@pytest.mark.parametrize("sizes", [(20, 3, 27), (0, 4, 0), (0, 0, 0), (64, 0, 1), (0, 0, 70), (16, 16, 16)])
def test_steps_give_each_row_to_its_own_matrix_once_and_move_no_idle_weights(sizes):
    rows, block = 70, 16
    plan = steps.plan(jnp.array(sizes), rows, block)
    owner, seen = np.full(80, -1), np.zeros(80, int)
    for matrix, index, start, end, owned in zip(*map(np.asarray, plan)):
        mine = np.arange(max(start, index * block), min(end, (index + 1) * block))
        seen[mine] += 1
        owner[mine] = matrix if owned else -1
    np.testing.assert_array_equal(seen, 1)
    np.testing.assert_array_equal(
        owner, np.pad(np.repeat(np.arange(3), sizes), (0, 80 - sum(sizes)), constant_values=-1)
    )
    assert (np.diff(plan.block) >= 0).all()  # what is left of a block is not come back to
    fetched = 1 + np.count_nonzero(np.diff(plan.matrix))
    assert fetched == max(1, np.count_nonzero(sizes))


def test_one_row_among_many_experts_is_a_step_and_one_for_what_fills_its_block():
    assert len(steps.plan(jnp.zeros(128, jnp.int32).at[77].set(1), 1, 32).block) == 2


@pytest.mark.parametrize("rows", [1, 40, 5000])
@pytest.mark.parametrize("outputs", [100, 16384])
def test_blocks_fit_the_product_and_the_memory(rows, outputs):
    workload = workloads.Workload(rows=rows, inputs=16384, outputs=outputs)
    arrays = jax.eval_shape(lambda *x: Operands.make(*x, leading=0, int8=True).arrays, *workload.shapes())
    operands = Operands(group=128, arrays=arrays)
    block = blocks.choose(operands)
    assert block.rows % 32 == 0 and block.columns % blocks.LANES == 0
    assert block.rows < rows + 32 and block.columns < outputs + blocks.LANES
    assert blocks.vmem(operands, *block) <= 2 * blocks.VMEM
