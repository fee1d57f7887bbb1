"""Counts of compiled programs whose numbers are known by hand, on eight CPU devices as 4 x 2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.plan import count, hlo

pytestmark = pytest.mark.multidevice

SIZES = {"fsdp": 4, "tensor": 2}


def counted(function, *shapes, specs):
    """Counts of `function`, run by shard_map on [..] float32 arrays that `specs` cut; the result is cut as the first."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), tuple(SIZES))
    spread = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    return count.count(hlo.parse(jax.jit(spread).lower(*arrays).compile().as_text()), SIZES)


ROWS, WHOLE = PartitionSpec("fsdp"), PartitionSpec()


def layers(depth):
    """`depth` products in a loop, each summed over tensor and passed on along fsdp."""

    def function(x, w):
        def layer(x, w):
            y = jax.lax.psum(x @ w, "tensor")
            return jax.lax.ppermute(y, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

        return jax.lax.scan(layer, x, w)[0]

    return counted(function, (64, 32), (depth, 32, 32), specs=(ROWS, WHOLE))


def test_a_loop_counts_as_often_as_it_runs():
    three, five = layers(3), layers(5)
    assert three.matrix_flops == 3 * 2 * 16 * 32 * 32 and five.matrix_flops == 5 * 2 * 16 * 32 * 32
    piece = 16 * 32 * 4  # bytes of a device's rows
    assert three.wire == {("all-reduce", "tensor"): 3 * piece, ("collective-permute", "fsdp"): 3 * piece}
    assert five.wire == {("all-reduce", "tensor"): 5 * piece, ("collective-permute", "fsdp"): 5 * piece}
    assert not three.dynamic_loops


def test_loops_within_loops_multiply():
    def function(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0] + 1.0, None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=3)[0]

    found = counted(function, (64, 32), (32, 32), specs=(ROWS, WHOLE))
    assert found.matrix_flops == 15 * 2 * 16 * 32 * 32


def test_gathers_and_scatters_count_what_a_chip_sends():
    def function(x, w):
        whole = jax.lax.all_gather(w, "fsdp", tiled=True)  # [32 32], of which a chip had 8 rows
        y = x @ whole
        return x + jax.lax.psum_scatter(y.T @ y, ("fsdp", "tensor"), tiled=True).sum()

    found = counted(function, (64, 32), (32, 32), specs=(ROWS, ROWS))
    row = 32 * 4
    assert found.wire["all-gather", "fsdp"] == 3 * 8 * row
    assert found.wire["reduce-scatter", "fsdp+tensor"] == 32 * row * 7 / 8
    assert found.wire_by_axes == {"fsdp": 24 * row, "fsdp+tensor": 28 * row}
    assert found.wire_bytes == 52 * row


def test_an_exchange_keeps_its_own_share():
    def function(x):
        return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)

    found = counted(function, (64, 32), specs=(ROWS,))
    assert found.wire == {("all-to-all", "fsdp"): 16 * 32 * 4 * 3 / 4}


def test_products_in_the_scope_of_attention_are_counted_apart():
    def function(x, w):
        with jax.named_scope("attend"):
            scores = jnp.tanh(x @ w)
        return jax.grad(lambda x: jnp.sum((x @ w) ** 2))(scores)

    found = counted(function, (64, 32), (32, 32), specs=(ROWS, WHOLE))
    assert found.attention_flops == 2 * 16 * 32 * 32
    assert found.matrix_flops == 2 * 2 * 16 * 32 * 32


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    def function(x, w):
        more = lambda carry: carry[0] < jnp.abs(carry[1]).sum().astype(jnp.int32)  # noqa: E731
        return jax.lax.while_loop(more, lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ w)), (0, x))[1]

    found = counted(function, (64, 32), (32, 32), specs=(ROWS, WHOLE))
    assert found.matrix_flops == 2 * 16 * 32 * 32
    assert len(found.dynamic_loops) == 1 and "while" in next(iter(found.dynamic_loops))


def test_of_a_conditional_the_largest_branch_counts():
    def function(x, w):
        twice = lambda x: jnp.tanh(x @ w) @ w  # noqa: E731
        return jax.lax.cond(x.sum() > 0, twice, lambda x: jnp.tanh(x @ w), x)

    found = counted(function, (64, 32), (32, 32), specs=(ROWS, WHOLE))
    assert found.matrix_flops == 2 * 2 * 16 * 32 * 32


def test_a_layer_read_out_of_a_stack_counts_as_one_layer():
    """Bytes grow with the layers that are read, not with their number times the stack."""

    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    few, many = (counted(function, (64, 128), (depth, 128, 128), specs=(ROWS, WHOLE)).hbm_bytes for depth in (4, 8))
    layer, rows = 128 * 128 * 4, 16 * 128 * 4
    # A CPU reads a layer out of the stack, writes it down and multiplies with it; rows go in and out of two instructions.
    assert 4 * 3 * layer < many - few < 4 * (3 * layer + 5 * rows)


@functools.cache
def _ragged_text(smaller_first: bool) -> str:
    small, large = ("f32[8,32]{1,0}", "f32[12,32]{1,0}") if smaller_first else ("f32[12,32]{1,0}", "f32[8,32]{1,0}")
    return (
        f"ENTRY %main (a: f32[8,32]) -> f32[8,32] {{\n  %a = {small} parameter(0)\n  %b = {large} parameter(1)\n"
        "  %o = s32[4]{0} parameter(2)\n"
        f"  ROOT %r = {large} ragged-all-to-all(%a, %b, %o, %o, %o, /*index=5*/%o), replica_groups=[2,4]<=[4,2]T(1,0)\n}}"
    )


@pytest.mark.parametrize("smaller_first", [True, False])
def test_a_ragged_exchange_counts_the_rows_there_are_and_says_how_large_its_buffer_is(smaller_first):
    found = count.count(hlo.parse(_ragged_text(smaller_first)), SIZES)
    assert found.wire == {("ragged-all-to-all", "fsdp"): 8 * 32 * 4 * 3 / 4}
    assert found.ragged_buffer == 12 * 32 * 4


_ROUNDS = """
%condition (c: (s32[], f32[32,8])) -> pred[] {
  %c = (s32[], f32[32,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %more = pred[] compare(%n, %n), direction=LT
}

%body (b: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %b = (s32[], f32[32,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %rows = f32[32,8]{1,0} get-tuple-element(%b), index=1
  %room = f32[ROOM,8]{1,0} broadcast(%n)
  %o = s32[4]{0} broadcast(%n)
  %received = f32[ROOM,8]{1,0} ragged-all-to-all(%rows, %room, %o, %o, %o, /*index=5*/%o), replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %next = (s32[], f32[32,8]{1,0}) tuple(%n, %rows)
}

ENTRY %main (a: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %a = (s32[], f32[32,8]{1,0}) parameter(0)
  ROOT %r = (s32[], f32[32,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize("room, sent", [(10, 4 * 10), (64, 32)])
def test_a_loop_of_exchanges_runs_as_often_as_rows_of_an_even_load_fill_its_buffer(room, sent):
    found = count.count(hlo.parse(_ROUNDS.replace("ROOM", str(room))), SIZES)
    assert found.wire == {("ragged-all-to-all", "fsdp"): sent * 8 * 4 * 3 / 4}


def test_an_instruction_that_stands_on_several_lines_is_one():
    text = (
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n  %k = f32[8]{0} custom-call(%a), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"block": "{2}"\n}}, '
        'metadata={op_name="jit(f)/attend"}\n  ROOT %r = f32[8]{0} negate(%k)\n}'
    )
    main = hlo.parse(text).computations["main"]
    assert main.root.name == "r" and main.instructions["k"].scope == "jit(f)/attend"
