"""A model of one table, for tests of the loop: same interface as Llama4, compiles in no time."""

import functools
import types

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import presets
from llama4_jax.core import names, parameter
from llama4_jax.train import losses, optim, step
from llama4_jax.train.state import create


class _Matrix(nnx.Module):
    def __init__(self, name: str, shape, rngs):
        setattr(self, name, parameter.kernel(rngs, shape, ("vocab", "embed"), fan_in=shape[0]))


class Bigram(nnx.Module):
    """Predicts the next token from the last one alone."""

    def __init__(self, vocab: int = 32, width: int = 8):
        rngs = nnx.Rngs(0)
        self.embed = _Matrix("table", (vocab, width), rngs)
        self.head = _Matrix("kernel", (width, vocab), rngs)

    def hidden(self, tokens, images=None, positions=None, segments=None, remat=None):
        del images, positions, segments, remat
        return types.SimpleNamespace(hidden=self.embed.table[...][tokens], aux={})

    def unembedding(self):
        return self.head.kernel[...]


def assemble(config):
    """State and step function of a bigram run."""
    structure, params = names.split(Bigram())
    optimizer = optim.make(config.optimizer, config.steps)
    objective = functools.partial(losses.next_token, config=config)
    state = create(params, optimizer, seed=config.seed)
    return state, step.make(structure, objective, optimizer, config, presets.tiny().text)


def equal(left, right) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs)
