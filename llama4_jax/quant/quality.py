"""What rounding did to a model: its loss on text before and after, and how often the likeliest token is still the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.model import Llama4


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over the tokens of a text that have a loss weight."""

    loss_before: float  # nats a token, of the model that was rounded
    loss_after: float  # of the rounded one
    agreement: float  # share of tokens after which both find the same next token likeliest
    divergence: float  # of the rounded model's distribution from the other's, nats (Kullback-Leibler)


def compare(before: Llama4, after: Llama4, batches: Iterable[Mapping[str, np.ndarray]]) -> Quality:
    """Both models on the same batches: tokens, targets [b t] int32, loss_weights [b t], and what `Llama4.__call__` takes.

    Raises ValueError without a single weighted token.
    """
    totals = np.zeros(5)
    for batch in batches:
        totals += np.asarray(_sums(_logits(before, batch), _logits(after, batch), batch), np.float64)
    if not totals[-1] > 0:
        raise ValueError("there is no token with a loss weight to compare on; give one batch or more")
    return Quality(*(totals[:-1] / totals[-1]).tolist())


def _logits(model: Llama4, batch: Mapping[str, np.ndarray]) -> jax.Array:
    return _run(model, {name: batch.get(name) for name in ("tokens", "images", "positions", "segments")})


@jax.jit
def _run(model: Llama4, arguments: Mapping[str, jax.Array | None]) -> jax.Array:
    return model(**arguments).logits


@jax.jit
def _sums(before: jax.Array, after: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The fields of `Quality` as weighted sums over tokens, and the sum of the weights."""
    before, after = (jax.nn.log_softmax(logits) for logits in (before, after))  # [b t v]
    weights = batch["loss_weights"].astype(jnp.float32)
    losses = [-jnp.take_along_axis(x, batch["targets"][..., None], -1)[..., 0] for x in (before, after)]
    same = jnp.argmax(before, -1) == jnp.argmax(after, -1)
    divergence = jnp.sum(jnp.exp(before) * (before - after), -1)
    return jnp.stack([jnp.sum(weights * each) for each in (*losses, same, divergence, jnp.ones_like(weights))])
