"""Grows a model's vocabulary: rows for new ids at the end of the embedding table and of the output matrix.

A new row is the mean of the rows of its parts, the old tokens that its bytes were written with. The old rows keep their
bits, so that a text of old tokens gets the logits it had, for the old ids. No row is added for padding: the new
`vocab_size` is the old one plus the new tokens, so choose their number to suit whatever the vocabulary is divided among.

Source: the mean of the parts, as in Gee et al. 2022, "Fast vocabulary transfer for language model compression".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model.llama4 import Llama4

NewRows = Callable[[np.ndarray], np.ndarray]  # the old rows [v d] float32 -> the new ones [n d]

_TABLE, _HEAD = "embed.table", "head.kernel"  # [v d] and [d v]


def grow(model: Llama4, new_rows: NewRows) -> Llama4:
    """`model` with rows for more ids, made by `new_rows` from those of the embedding and, untied, of the output matrix.

    The weights keep their dtype; all others are shared with `model`.
    """
    params = names.held(model)
    params[_TABLE] = _append(params[_TABLE], new_rows, axis=0)
    if _HEAD in params:
        params[_HEAD] = _append(params[_HEAD], new_rows, axis=1)
    text = dataclasses.replace(model.config.text, vocab_size=params[_TABLE].shape[0])
    config = dataclasses.replace(model.config, text=text)
    scan = bool(model.decoder.periods)
    structure, _ = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=scan)))
    return structure.merge(params)


def mean_of_parts(parts: Sequence[Sequence[int]]) -> NewRows:
    """Rows for `len(parts)` new ids, each the mean, taken in float32, of the rows of its old ids."""

    def rows(old: np.ndarray) -> np.ndarray:
        wrong = [part for part in parts if not part or min(part) < 0 or max(part) >= len(old)]
        if wrong:
            raise ValueError(
                f"a new token has the parts {list(wrong[0])}; wanted one or more of the {len(old)} ids that the model "
                "has: use the tokenizer that it was trained with"
            )
        return np.stack([old[list(part)].mean(axis=0) for part in parts])

    return rows


def drawn(count: int, seed: int) -> NewRows:
    """`count` rows drawn from a normal with the mean and deviation of the old rows in each channel: a baseline."""
    rng = np.random.default_rng(seed)  # goes on from one matrix to the next, which should not be alike

    def rows(old: np.ndarray) -> np.ndarray:
        return rng.normal(old.mean(axis=0), old.std(axis=0), (count, old.shape[1]))

    return rows


def _append(array: jax.Array, new_rows: NewRows, axis: int) -> jax.Array:
    """`array` with new rows behind the old ones on `axis`, the vocabulary's."""
    if isinstance(array, QuantizedArray):
        raise ValueError(f"the vocabulary's weights are held in {array.values.dtype}; grow it first, then quantise")
    old = np.moveaxis(np.asarray(array).astype(np.float32), axis, 0)  # [v d]
    new = np.moveaxis(new_rows(old), 0, axis)
    return jnp.concatenate([array, jnp.asarray(new, array.dtype)], axis=axis)
