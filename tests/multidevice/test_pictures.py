"""Features of pictures that devices share out reach the placeholders that one device would give them to, and gradients return."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.core import partitioning
from llama4_jax.kernels.attention import Layout
from llama4_jax.model import fusion, pictures

pytestmark = pytest.mark.multidevice

ROWS, TIME, PER_PICTURE, DIM = 4, 16, 2, 3
MESHES = [
    ({"fsdp": 2, "expert": 2, "tensor": 2}, partitioning.TRAIN),
    ({"slice": 2, "fsdp": 2, "context": 2}, partitioning.TRAIN),
    ({"fsdp": 2, "expert": 2, "context": 2}, partitioning.LONG),
]
# Numbers of pictures in each row; in the last the batch has placeholders for fewer than there are.
SPREADS = {"even": [2, 2, 2, 2], "at the end": [0, 0, 1, 6], "at the start": [8, 1, 0, 0], "one": [0, 1, 0, 0]}


def story(counts: list[int], surplus: int):
    """Embeddings [b t d], images [n p 1 d] whose pixels are their features, and placeholders [b t] in the row's order."""
    rng = np.random.default_rng(0)
    placeholders = np.zeros((ROWS, TIME), bool)
    for row, count in zip(placeholders, counts):
        row[rng.permutation(TIME)[: count * PER_PICTURE]] = True
    images = rng.normal(size=(sum(counts) + surplus, PER_PICTURE, 1, DIM)).astype(np.float32)
    return rng.normal(size=(ROWS, TIME, DIM)).astype(np.float32), images, placeholders


@pytest.mark.parametrize("sizes, placement", MESHES, ids=["tensor", "context", "zigzag"])
def test_features_and_gradients_go_where_one_device_puts_them(sizes, placement):
    mesh = partitioning.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    weights = np.random.default_rng(1).normal(size=(ROWS, TIME, DIM)).astype(np.float32)
    layout = Layout.of(placement, mesh)

    def apart(embeddings, images, placeholders):
        spread = partitioning.mesh_in_use()
        features = pictures.deal(spread, images)[:, :, 0]
        return pictures.deliver(spread, embeddings, features, placeholders, images.shape[0])

    def alone(embeddings, images, placeholders):
        return fusion.fuse(embeddings, images[:, :, 0], placeholders, layout)

    def run(function, embeddings, images, placeholders):
        fused, pull = jax.vjp(lambda *inputs: function(*inputs, placeholders), embeddings, images)
        return fused, *pull(jnp.asarray(weights))

    for name, counts in SPREADS.items():
        embeddings, images, placeholders = story(counts, surplus=9 - sum(counts))
        placeholders = layout.place(placeholders)
        wanted = jax.jit(run, static_argnums=0)(alone, embeddings, images, placeholders)
        with partitioning.use(mesh, placement):
            found = jax.jit(run, static_argnums=0)(apart, embeddings, images, placeholders)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
