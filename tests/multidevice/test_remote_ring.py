"""The ring that sends by remote DMA, in JAX's interpreter of TPU kernels: the suite of rings, and no races but on purpose."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from llama4_jax.core.partitioning import TimeOrder
from llama4_jax.kernels.attention import Layout, ring, spread, workloads
from llama4_jax.kernels.attention.blocks import Blocking, Tokens
from llama4_jax.kernels.attention.ring import remote
from llama4_jax.kernels.attention.ring.passing import Ring
from llama4_jax.testing import spread_attention

pytestmark = pytest.mark.multidevice

ONE_ROW = {"batch": 1, "heads": 2, "kv_heads": 1}  # the interpreter takes about 0.05 s for each step of a kernel's grid
# (workload, changes to it, devices, zig-zag order, (queries, keys) of a block); pieces of 8 to 32 tokens, filled up.
CASES = {
    "more panels than semaphores": ("packed_global", {"batch": 1, "heads": 5, "kv_heads": 5}, 2, False, (32, 32)),
    "chunks, uneven length": ("chunk_divides_no_block", ONE_ROW, 4, True, (8, 16)),
    "two panels, heads in groups": ("left_padded", {"heads": 5, "kv_heads": 1}, 2, True, (16, 5)),
    "eight devices": ("packed", ONE_ROW, 8, True, (8, 8)),
}


@pytest.fixture
def races(capfd, caplog):
    """Interprets kernels, and counts the races that were reported so far."""
    # Newer interpreters raise at the first race, which leaves the other devices waiting.
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    params = pltpu.InterpretParams(detect_races=True, **({"on_race": "warn"} if "on_race" in fields else {}))
    with pltpu.force_tpu_interpret_mode(params):
        yield lambda: (capfd.readouterr().out + caplog.text).count("RACE DETECTED")


def inputs(name, changes, devices, zigzag, dtype=jnp.float32):
    workload = dataclasses.replace(workloads.SMALL[name], **changes)
    layout = Layout(devices=devices, order=TimeOrder.ZIGZAG if zigzag else TimeOrder.ROW)
    return *spread_attention.inputs(workload, layout, dtype), workload.chunk_size


def over(devices, queries, keys):
    mesh = Mesh(jax.devices()[:devices], ("context",))
    blocking = Blocking(queries=queries, keys=keys, chunk_size=None)
    return ring.over_mesh(mesh, PartitionSpec(None, "context", None, None), blocking=blocking, implementation="remote")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough if "panels, heads" in case else ()) for case in CASES]
)
def test_a_remote_ring_equals_the_reference_without_races(races, case):
    name, changes, devices, zigzag, sizes = CASES[case]
    spread_attention.check(over(devices, *sizes), *inputs(name, changes, devices, zigzag))
    assert races() == 0


def test_bfloat16_goes_round_and_a_row_that_sees_nothing_gives_zeros(races):
    arrays, tokens, chunk_size = inputs("causal", ONE_ROW, 2, False, jnp.bfloat16)
    tokens["query_segments"] = tokens["query_segments"].at[:, 20:30].set(7)
    spread_attention.check(over(2, 16, 16), arrays, tokens, chunk_size)
    assert races() == 0


def test_neighbours_are_found_on_a_mesh_of_several_axes(races):
    arrays, tokens, chunk_size = inputs("packed", {}, 2, True)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "context", "tensor"))
    spec = PartitionSpec("data", "context", "tensor", None)
    blocking = Blocking(queries=16, keys=16, chunk_size=None)
    attend = ring.over_mesh(mesh, spec, blocking=blocking, implementation="remote")
    spread_attention.check(attend, arrays, tokens, chunk_size)
    assert races() == 0


@pytest.mark.parametrize("credits", [True, False])
def test_without_credits_a_device_writes_over_what_its_neighbour_reads(races, credits):
    """The negative control: what the detector says of the kernel means something only because of this."""
    arrays, tokens, chunk_size = inputs("causal", ONE_ROW, 4, False)
    mesh, blocking = Mesh(jax.devices()[:4], ("context",)), Blocking(queries=16, keys=16, chunk_size=None)

    def piece(query, key, value, *, query_positions, key_positions, query_segments, key_segments, chunk_size):
        queries, keys = Tokens(query_positions, query_segments), Tokens(key_positions, key_segments)
        along = Ring(axis_name="context", size=4, credits=credits)
        return remote.attend_pieces(along, blocking, chunk_size, query, key, value, queries, keys)

    attend = spread.over_mesh(piece, mesh, PartitionSpec(None, "context", None, None))
    jax.block_until_ready(
        jax.jit(partial(spread_attention.output_and_gradients, attend, chunk_size=chunk_size))(arrays, tokens)
    )
    assert (races() > 0) is not credits
