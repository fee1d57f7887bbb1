"""What matrices multiply, as rows, and the second moments of these: x x^T, summed over rows x.

Rows are numpy arrays, so that those of much text wait outside of an accelerator's memory; they are added up there in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import int4_matmul
from llama4_jax.nn.mlp import swiglu
from llama4_jax.quant.matrices import Leaf

PIECE = 512  # rows at once: one program for any number of them


def second_moments(rows: np.ndarray) -> jax.Array:
    """The sum of x x^T over rows x of [r i]: [i i] float32."""
    total = jnp.zeros((rows.shape[1],) * 2, jnp.float32)
    for piece, _ in _pieces(rows):
        total = _added(total, piece)
    return total


def present(arrays: Sequence[jax.Array], segments: Sequence[jax.Array]) -> np.ndarray:
    """Arrays [b t ..] of all batches as rows [r i], without padding, which has segment 0."""
    flat = [np.asarray(array).reshape(*array.shape[:2], -1) for array in arrays]
    return np.concatenate([array[np.asarray(segment) != 0] for array, segment in zip(flat, segments)])


def of_experts(router, rows: np.ndarray, extra_tokens: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """For each routed expert the rows that it multiplies, and how many of these the router sent it, the first ones.

    rows: [r d], tokens; an expert multiplies a token times its score. An expert that fewer than `extra_tokens` tokens chose is
    given more, up to so many: those of the others that it has the highest scores for.
    """
    routing, logits = _routed(router, rows)
    experts, scores, logits = (np.asarray(x) for x in (routing.experts, routing.scores, logits))
    for e in range(logits.shape[1]):
        tokens, choices = np.nonzero(experts == e)
        others = np.setdiff1d(np.arange(len(rows)), tokens)
        best = others[np.argsort(-logits[others, e], kind="stable")][: max(extra_tokens - len(tokens), 0)]
        weights = np.concatenate([scores[tokens, choices].astype(np.float32), 1 / (1 + np.exp(-logits[best, e]))])
        yield rows[np.concatenate([tokens, best])] * weights[:, None].astype(rows.dtype), len(tokens)


def hidden(rows: np.ndarray, gate_up: Leaf) -> np.ndarray:
    """What an expert's `down` [f d] multiplies, [r f], where `gate_up` [d 2 f] multiplies rows [r d]."""
    pieces = [np.asarray(_hidden(piece, gate_up))[:number] for piece, number in _pieces(rows)]
    return np.concatenate(pieces) if pieces else np.zeros((0, gate_up.shape[-1]), rows.dtype)


def _pieces(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in pieces of PIECE, the last filled up with zeros, and how many rows of each are real."""
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE]
        yield np.concatenate([piece, np.zeros((PIECE - len(piece), rows.shape[1]), rows.dtype)]), len(piece)


@jax.jit
def _added(total: jax.Array, rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return total + jnp.einsum("ri,rj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _routed(router: nnx.Module, rows: jax.Array):
    routing, _ = router(rows, jnp.ones(rows.shape[0], bool))
    return routing, jnp.matmul(rows, jnp.asarray(router.kernel[...])).astype(jnp.float32)


@jax.jit
def _hidden(rows: jax.Array, gate_up: Leaf) -> jax.Array:
    if isinstance(gate_up, QuantizedArray):
        return swiglu(int4_matmul.matmul(rows, gate_up))
    return swiglu(jnp.tensordot(rows, gate_up, axes=1))
