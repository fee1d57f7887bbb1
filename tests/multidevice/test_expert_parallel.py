"""Experts on a mesh: the exchange against numpy, and the mixture against that of one device, under every skew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from llama4_jax.config import MoeConfig
from llama4_jax.core import partitioning
from llama4_jax.kernels.exchange import ragged_all_to_all
from llama4_jax.nn import dispatch, expert_parallel
from llama4_jax.nn.moe import Experts
from llama4_jax.nn.router import Routing

pytestmark = pytest.mark.multidevice

EXPERTS, DIM, BATCH, TIME = 8, 16, 8, 12
MESHES = [
    {"expert": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 8},
    {"fsdp": 2, "expert": 2, "context": 2},
]
# What the router of a token chooses, [k] of (row, time); a load of all kinds.
CHOICES = {
    "uneven": lambda row, time: [(row * time) % 3 + (time > 9)],
    "one expert": lambda row, time: [5],
    "two of eight": lambda row, time: [(row + time) % EXPERTS, (row * 3 + time * time + 1) % EXPERTS],
}


def test_the_emulated_exchange_puts_parts_where_senders_say():
    """Two parts for each of eight devices, of 0 to 3 rows; what nobody writes stays."""
    devices, rng = 8, np.random.default_rng(0)
    size = rng.integers(0, 4, (devices, devices * 2)).astype(np.int32)  # [sender part]
    source = rng.integers(0, 9, size.shape).astype(np.int32)
    arriving = size.reshape(devices, devices, 2).swapaxes(0, 1).reshape(devices, -1)  # [receiver part]
    place = (np.cumsum(arriving, 1) - arriving + 2).astype(np.int32)  # from row 2 on, in order of the senders
    target = place.reshape(devices, devices, 2).swapaxes(0, 1).reshape(devices, -1)
    operand = rng.normal(size=(devices * 12, 3)).astype(np.float32)
    output = rng.normal(size=(devices * 64, 3)).astype(np.float32)

    wanted = output.copy().reshape(devices, 64, 3)
    for sender in range(devices):
        for part in range(devices * 2):
            begin, count, to = source[sender, part], size[sender, part], target[sender, part]
            wanted[part // 2, to : to + count] = operand.reshape(devices, 12, 3)[sender, begin : begin + count]

    mesh, row = partitioning.make_mesh({"expert": devices}), PartitionSpec("expert")
    exchange = functools.partial(ragged_all_to_all, axis_name="expert", implementation="emulated")
    call = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=row, out_specs=row, check_vma=False))
    found = call(operand, output, *(x.ravel() for x in (source, size, target, arriving)))
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def story(name, batch=BATCH, time=TIME):
    """x [b t d], routing, and who is present: the last two tokens of each row are padding."""
    x, scores, _ = (jax.random.normal(jax.random.key(i), (batch, time, DIM)) for i in range(3))
    choices = jnp.array([[CHOICES[name](i, j) for j in range(time)] for i in range(batch)], jnp.int32)
    scores = jax.nn.sigmoid(scores[..., : choices.shape[-1]])
    return x, Routing(experts=choices, scores=scores), jnp.arange(time) < jnp.full((batch, 1), max(time - 2, 1))


def experts():
    return Experts(MoeConfig(num_experts=EXPERTS, expert_dim=8), DIM, rngs=nnx.Rngs(0), output_gain=1.0)


def results(mixture, name, **sizes):
    """Output, rows seen, and gradients of experts, x and scores."""
    x, routing, present = story(name, **sizes)
    cotangent = jax.random.normal(jax.random.key(7), x.shape)

    def run(experts, x, scores):
        out, seen = mixture(experts, x, routing.replace(scores=scores), present)
        return jnp.sum(out * cotangent), (out, seen)

    call = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, (out, seen)), gradients = call(experts(), x, routing.scores)
    return {"out": out, "seen": seen, "experts": gradients[0], "x": gradients[1], "scores": gradients[2]}


def alone(experts, x, routing, present):
    flat = Routing(*(a.reshape(-1, a.shape[-1]) for a in (routing.experts, routing.scores)))
    out, seen = dispatch.mixture(experts, x.reshape(-1, DIM), flat, present.reshape(-1), EXPERTS)
    return out.reshape(x.shape), seen


def check(found, wanted):
    for name, value in wanted.items():
        for one, other in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            # fp32 sums of at most BATCH * TIME terms of about 1, in another order.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5, err_msg=name)


FIRST = [(MESHES[0], "uneven"), (MESHES[0], "one expert"), (MESHES[1], "two of eight")]
MORE = [(mesh, name) for mesh in MESHES for name in CHOICES if (mesh, name) not in FIRST]


@pytest.mark.parametrize(
    ("sizes", "name"), FIRST + [pytest.param(*case, marks=pytest.mark.thorough) for case in MORE], ids=str
)
def test_a_mixture_on_a_mesh_equals_that_of_one_device(sizes, name):
    mesh = partitioning.make_mesh(sizes).abstract_mesh
    with jax.set_mesh(partitioning.make_mesh(sizes)):
        # 7 rows a round: two rounds where the load is even, and up to 24 where one expert gets everything.
        on_mesh = functools.partial(expert_parallel.mixture, mesh, num_experts=EXPERTS, rows_per_round=7)
        found = results(on_mesh, name)
    wanted = results(alone, name)
    assert found["seen"] == BATCH * (TIME - 2) * len(CHOICES[name](0, 0))
    check(found, wanted)


def test_gradients_of_experts_come_back_in_the_shards_of_training():
    mesh = partitioning.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        on_mesh = functools.partial(expert_parallel.mixture, mesh.abstract_mesh, num_experts=EXPERTS)
        found = results(on_mesh, "uneven")["experts"]
    for gradient, place in zip(
        jax.tree.leaves(found), jax.tree.leaves(partitioning.shardings(experts(), partitioning.TRAIN, mesh))
    ):
        assert gradient.sharding.is_equivalent_to(place, gradient.ndim)


@pytest.mark.parametrize("batch, time", [(3, 1), (1, 5)])
def test_tokens_that_do_not_divide_the_mesh_are_filled_up(batch, time):
    mesh = partitioning.make_mesh({"expert": 4, "context": 2})
    with jax.set_mesh(mesh):
        on_mesh = functools.partial(expert_parallel.mixture, mesh.abstract_mesh, num_experts=EXPERTS)
        found = results(on_mesh, "two of eight", batch=batch, time=time)
    check(found, results(alone, "two of eight", batch=batch, time=time))


def test_whole_rounds_take_an_even_load_and_few_rows_go_in_one():
    assert expert_parallel.rows_in_a_round(16384, 16) * expert_parallel.ROUNDS == 16384
    assert expert_parallel.rows_in_a_round(2, 4) == 8


def test_experts_that_devices_cannot_share_evenly_are_refused():
    mesh = partitioning.make_mesh({"expert": 8})
    odd = Experts(MoeConfig(num_experts=6, expert_dim=8), DIM, rngs=nnx.Rngs(0), output_gain=1.0)
    x, routing, present = story("uneven")
    with pytest.raises(ValueError, match="experts=6 is not divisible by expert=8; split it 1, 2, 3 or 6 ways"):
        expert_parallel.mixture(mesh.abstract_mesh, odd, x, routing, present, 6)
