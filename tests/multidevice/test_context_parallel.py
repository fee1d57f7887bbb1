"""Rows spread over devices: chunked layers send what their chunks need, and nothing where that is nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import LONG, TRAIN, TimeOrder
from llama4_jax.kernels.attention import Layout, attend_sequence, neighbours
from llama4_jax.kernels.attention.workloads import Workload
from llama4_jax.plan import count, hlo
from llama4_jax.testing import spread_attention, tiny
from llama4_jax.train import losses

pytestmark = pytest.mark.multidevice

# Two query heads to a key-value head. Documents begin in the middle of pieces, and one row is padded on the left.
PACKED = Workload(
    batch=2,
    query_length=64,
    key_length=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    documents=((40, 24), (5, 1, 30, 18)),
    left_padding=(0, 9),
)
ALONE = dataclasses.replace(PACKED, documents=((64,), (50,)), left_padding=(0,))


@pytest.mark.parametrize(
    "workload, devices, order, chunk_size",
    [
        (PACKED, 4, TimeOrder.ROW, 16),  # pieces of one chunk, which documents begin anywhere in
        (PACKED, 8, TimeOrder.ROW, 20),  # pieces of 8 tokens: a chunk lies on four devices
        (PACKED, 2, TimeOrder.ROW, 6),  # the last 5 tokens of a piece are enough, and in one row needed
        (PACKED, 4, TimeOrder.ZIGZAG, 7),  # pieces of 8
        (PACKED, 4, TimeOrder.ZIGZAG, 30),  # the pieces before both of a device's own, some of them twice
        (ALONE, 4, TimeOrder.ROW, 16),
        (ALONE, 8, TimeOrder.ROW, 24),  # three devices share a chunk
        (ALONE, 8, TimeOrder.ZIGZAG, 6),  # pieces of 4: their borders are not those of chunks
    ],
)
def test_chunked_attention_over_devices_equals_the_reference(workload, devices, order, chunk_size):
    layout = Layout(devices=devices, order=order, aligned=workload is ALONE)
    mesh = Mesh(jax.devices()[:devices], ("context",))
    attend = neighbours.over_mesh(mesh, PartitionSpec(None, "context", None, None), layout)
    spread_attention.check(attend, *spread_attention.inputs(workload, layout), chunk_size)


def gradient(placement, sizes, length, chunk_size, remat=None):
    """The gradient of one attention layer over a mesh, compiled: one row, 2 key-value heads of 8.

    remat: a name in `config.train.REMAT`; without one nothing is computed again.
    """
    mesh = partitioning.make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])

    def place(*shape):
        sharding = partitioning.batch_sharding(shape[:2], placement, mesh)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) > 2 else jnp.int32, sharding=sharding)

    def run(query, key, value, positions, segments):
        call = lambda *arrays: attend_sequence(*arrays, positions, segments, chunk_size)  # noqa: E731
        if remat:
            call = jax.checkpoint(call, policy=losses.rematerialisation(remat))
        return jax.grad(lambda *arrays: jnp.sum(call(*arrays) ** 2), argnums=(0, 1, 2))(query, key, value)

    query, key, token = place(1, length, 4, 8), place(1, length, 2, 8), place(1, length)
    with partitioning.use(mesh, placement):
        return jax.jit(run).lower(query, key, key, token, token).compile()


def wire(program, **sizes):
    """Bytes that a device sends, by (kind of collective, axes of the mesh)."""
    return count.count(hlo.parse(program.as_text()), sizes).wire


TOKEN = 2 * 2 * 8 * 4  # bytes of a token's key and value
TAG = 2 * 4  # and of its position and segment


@pytest.mark.parametrize(
    "placement, sizes", [(TRAIN, {"context": 4}), (LONG, {"expert": 2, "context": 2})], ids=lambda x: str(x)[:15]
)
def test_a_chunked_layer_whose_pieces_are_whole_chunks_does_not_communicate(placement, sizes):
    """Neither forward nor backward: 64 tokens in pieces of 16, or of 8 in zig-zag order, and chunks of 8.

    What is left are sums over the mesh's axes of size 1, each device with itself.
    """
    program = gradient(dataclasses.replace(placement, aligned=True), sizes, 64, 8)
    assert wire(program, **sizes) == {}
    assert not re.search("collective-permute|all-gather|all-to-all|reduce-scatter", program.as_text())
    assert set(re.findall(r"all-reduce\(.*replica_groups=(\S+), use", program.as_text())) <= {"{{0},{1},{2},{3}}"}


def test_an_unaligned_chunked_layer_sends_less_than_a_chunk():
    """The gradient sends the last 7 tokens' keys and values to the next device, and their gradients back."""
    program = gradient(TRAIN, {"context": 4}, 64, 8)
    assert wire(program, context=4) == {("collective-permute", "context"): 7 * (2 * TOKEN + TAG)}
    assert "source_target_pairs={{0,1},{1,2},{2,3}}" in program.as_text()  # no way round
    assert "source_target_pairs={{1,0},{2,1},{3,2}}" in program.as_text()
    ring = gradient(TRAIN, {"context": 4}, 64, None)
    # A forward ring of 3 hops, then one of 4 in which gradients travel along.
    assert wire(ring, context=4) == {
        ("collective-permute", "context"): 16 * (3 * TOKEN + 3 * TAG + 8 * TOKEN + 4 * TAG)
    }


def test_keys_go_round_once_more_unless_the_policy_keeps_what_was_attended():
    ring = {remat: gradient(TRAIN, {"context": 4}, 64, None, remat) for remat in ("block", "attention", None)}
    sent = {remat: wire(program, context=4)["collective-permute", "context"] for remat, program in ring.items()}
    assert sent["attention"] == sent[None] and sent["block"] - sent[None] == 16 * 3 * (TOKEN + TAG)


def test_memory_of_a_device_does_not_grow_with_the_length_of_the_whole():
    few, many = (gradient(TRAIN, {"context": n}, n * 256, 64).memory_analysis().temp_size_in_bytes for n in (2, 8))
    assert many <= 1.02 * few


def test_rows_of_one_document_are_known_to_be_aligned_and_others_are_not():
    """One chunked layer of the model, as it is compiled: without segments chunks of 4 lie in pieces of 8 tokens."""
    model, mesh = tiny.model(tiny.text_config(num_layers=1)), partitioning.make_mesh({"context": 4, "data": 2})
    token = jax.ShapeDtypeStruct((2, 32), jnp.int32, sharding=partitioning.batch_sharding((2, 32), TRAIN, mesh))

    def compiled(*more):
        run = lambda tokens, *more: model.hidden(tokens, None, *more).hidden  # noqa: E731
        with partitioning.use(mesh):
            return jax.jit(run).lower(token, *more).compile().as_text()

    assert "exchange" in compiled(token, token)
    assert "exchange" not in compiled()
    with partitioning.use(mesh, LONG), pytest.raises(ValueError, match="zigzag order over 4 devices.* give positions"):
        model(jnp.ones((2, 32), jnp.int32))
