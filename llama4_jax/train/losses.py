"""Next-token loss: cross-entropy from hidden states without all the logits, z-loss, and the router's losses.

The cross-entropy of one token is logsumexp(logits) - logits[target]. Its gradient with respect to the logits,
softmax - onehot, is at hand as soon as the logits are, so a differentiated call turns each chunk of logits into its
share of the gradients of the hidden states and of the output matrix at once and forgets it: three matrix products as
in the plain loss, and never more than `logits_limit` logits alive. On one device tokens without weight, such as prompts,
pictures and padding, are put last, and chunks of nothing else are passed over.

Source: the fused linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), chunked over time here so
that a batch axis may stay sharded; z-loss of PaLM (Chowdhery et al. 2022, section 5).
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from llama4_jax.config.train import REMAT, TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import int4_matmul
from llama4_jax.model.decoder import BLOCK_INPUT
from llama4_jax.train import spread_loss

logger = logging.getLogger(__name__)


class Terms(NamedTuple):
    """What an objective returns for one microbatch. Everything is a sum over tokens, so that microbatches add up;
    the step divides by the total weight."""

    loss: jax.Array  # [] weighted sum, the quantity that is differentiated
    weight: jax.Array  # [] sum of the loss weights
    sums: dict[str, jax.Array]  # metrics, each times the weight


class Vocabulary:
    """The columns of the logits that a device sees: here all of them; `spread_loss` has a part on each device."""

    first = 0

    def highest(self, x: jax.Array) -> jax.Array:
        """The highest over all parts, of each part's highest."""
        return x

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all parts, of each part's sum."""
        return x


WHOLE = Vocabulary()
WORTH_SORTING = 2**20  # logits: with fewer, passing over some gains less than a loop costs
PIECES = 8  # at least, of sorted tokens: an eighth is the finest share of weightless tokens that counts


def next_token(model, batch: dict[str, jax.Array], rng: jax.Array, *, config: TrainConfig) -> Terms:
    """Masked next-token loss of a batch plus the router losses that `config` asks for.

    batch: tokens, targets, positions, segments [b t] int32 (segment 0 is padding), loss_weights [b t] float32 and,
    optionally, images [n h w c]. `rng` is unused: the model has no dropout.
    """
    del rng
    out = model.hidden(
        batch["tokens"],
        images=batch.get("images"),
        positions=batch["positions"],
        segments=batch["segments"],
        remat=rematerialisation(config.remat, config.kept_in),
    )
    weights = batch["loss_weights"].astype(jnp.float32)
    total, nll = cross_entropy(
        *_factors(out.hidden, model.unembedding()),
        batch["targets"],
        weights,
        z_loss=config.z_loss,
        logits_limit=config.logits_limit,
    )
    weight = weights.sum()
    router = {name: value.mean() for name, value in out.aux.items() if name != "load" and value.size}
    router_loss = config.balance_loss * router.get("balance_loss", 0.0)
    router_loss += config.router_z_loss * router.get("z_loss", 0.0)
    sums = {"loss": nll} | {f"router_{name}": weight * value for name, value in router.items()}
    if "load" in out.aux and out.aux["load"].size:
        sums["load"] = weight * jax.lax.stop_gradient(out.aux["load"])  # [l e]
    return Terms(total + weight * router_loss, weight, sums)


def _factors(hidden: jax.Array, unembedding: jax.Array | QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """What chunks of logits are the product of; of an unembedding in few bits what it stands for, and rows as it wants them."""
    if not isinstance(unembedding, QuantizedArray):
        return hidden, unembedding
    return int4_matmul.rounded(hidden, unembedding.activations), unembedding.astype(hidden.dtype).dequantize()


def rematerialisation(name: str, kept_in: str = "device"):
    """What `Llama4.hidden` takes for a name in `config.train.REMAT`, and where that is kept: "device" or "host".

    What is kept on the host includes the inputs of layers, which no policy computes again.
    """
    kept = REMAT[name]
    if kept is None:
        return None
    if kept_in == "device":
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*kept, BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    logits_limit: int = 2**24,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over tokens of (nll + z_loss * logsumexp^2), and of nll alone; both float32.

    hidden [b t d], unembedding [d v], targets [b t] int32, weights [b t] float32. At most `logits_limit` logits exist
    at once, as long as one time step's b * v fits; fewer than that in all and everything is one chunk. Differentiable
    in `hidden` and `unembedding`, through the first result only: weights are data, and the second is a metric.
    """
    b, t, _ = hidden.shape
    v = unembedding.shape[1]
    mesh = partitioning.mesh_in_use()
    if mesh is not None:  # the limit is for one device's share
        b, t, v = (-(-size // ways) for size, ways in zip((b, t, v), spread_loss.ways(mesh)))
    chunks = min(t, -(-b * t * v // logits_limit))
    if chunks > 1:
        _report_chunks(b * t, v, chunks, logits_limit)
    if mesh is None and b * t * v >= WORTH_SORTING:
        hidden, targets, weights = _weightless_last(hidden, targets, weights)
        chunks = min(b * t, max(PIECES, -(-b * t * v // logits_limit)))
    total, nll = _sums(hidden, unembedding, targets, weights, z_loss, chunks)
    return total, jax.lax.stop_gradient(nll)


def _weightless_last(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """The tokens of all rows as one row, [1 b*t ...], those without weight at its end."""
    order = jnp.argsort(weights.ravel() == 0)
    rows = (rearrange(x, "b t ... -> (b t) ...") for x in (hidden, targets, weights))
    return tuple(x.at[order].get(unique_indices=True, mode="promise_in_bounds")[None] for x in rows)


@functools.cache
def _report_chunks(tokens: int, v: int, chunks: int, limit: int) -> None:
    logger.info(
        "cross-entropy in %d chunks: %d tokens x %d vocabulary exceed logits_limit=%d", chunks, tokens, v, limit
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(hidden, unembedding, targets, weights, z_loss, chunks):
    def add(sums, chunk):
        total, nll, _ = _token_sums(*chunk, unembedding, z_loss=z_loss)
        return (sums[0] + total, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return _over_time(add, (zero, zero), (hidden, targets, weights), chunks)[0]


def _sums_forward(hidden, unembedding, targets, weights, z_loss, chunks):
    mesh = partitioning.mesh_in_use()
    if mesh is not None and spread_loss.divides(mesh, *hidden.shape[:2], unembedding.shape[1]):
        fold = functools.partial(_over_time, chunks=chunks)
        total, nll, *gradients = spread_loss.sums(
            mesh, hidden, unembedding, targets, weights, functools.partial(_token_sums, z_loss=z_loss), fold
        )
        return (total, nll), (*gradients, targets.shape)

    def add(carry, chunk):
        total, nll, logits_gradient = _token_sums(*chunk, unembedding, z_loss=z_loss)
        # The matrix products of the backward pass run in the compute dtype, as the plain loss's would.
        logits_gradient = logits_gradient.astype(unembedding.dtype)
        hidden_gradient = jnp.einsum("btv,dv->btd", logits_gradient, unembedding).astype(hidden.dtype)
        share = jnp.einsum("btd,btv->dv", chunk[0], logits_gradient, preferred_element_type=jnp.float32)
        return (carry[0] + total, carry[1] + nll, carry[2] + share), hidden_gradient

    zero = jnp.zeros((), jnp.float32)
    # Float32 whatever the compute dtype: this adds up over chunks.
    start = (zero, zero, jnp.zeros(unembedding.shape, jnp.float32))
    (total, nll, matrix_gradient), hidden_gradient = _over_time(add, start, (hidden, targets, weights), chunks)
    return (total, nll), (hidden_gradient, matrix_gradient.astype(unembedding.dtype), targets.shape)


def _sums_backward(z_loss, chunks, residuals, cotangents):
    hidden_gradient, matrix_gradient, shape = residuals
    scale = cotangents[0]
    return (
        scale.astype(hidden_gradient.dtype) * hidden_gradient,
        scale.astype(matrix_gradient.dtype) * matrix_gradient,
        np.zeros(shape, jax.dtypes.float0),
        jnp.zeros(shape, jnp.float32),
    )


_sums.defvjp(_sums_forward, _sums_backward)


def _token_sums(hidden, targets, weights, unembedding, vocabulary=WHOLE, *, z_loss):
    """Weighted loss and nll of one chunk, and the gradient of the loss in its logits [b t v] (dead code if unused)."""
    # Float32 logits: a softmax over 200k entries loses its tail in bfloat16.
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    onehot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == (targets - vocabulary.first)[..., None]
    peak = vocabulary.highest(logits.max(-1))
    exponentials = jnp.exp(logits - peak[..., None])
    total = vocabulary.total(exponentials.sum(-1))
    normaliser = peak + jnp.log(total)  # [b t]
    chosen = vocabulary.total(jnp.where(onehot, logits, 0.0).sum(-1))
    nll = weights * (normaliser - chosen)
    pull = weights * (1.0 + 2.0 * z_loss * normaliser)
    gradient = (pull / total)[..., None] * exponentials - jnp.where(onehot, weights[..., None], 0.0)
    return (nll + z_loss * weights * normaliser**2).sum(), nll.sum(), gradient


def _unless_weightless(add):
    """`add` of a chunk, but one without a single weighted token is passed over."""

    def run(carry, chunk):
        skipped = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(add, carry, chunk)[1])
        return jax.lax.cond((chunk[2] != 0).any(), add, lambda carry, _: (carry, skipped), carry, chunk)

    return run


def _over_time(function, start, inputs, chunks):
    """`lax.scan` of `function` over equal pieces of the time axis (1) of `inputs`; no loop when there is one piece."""
    if chunks <= 1:
        return function(start, inputs)
    t = inputs[0].shape[1]
    size = -(-t // chunks)
    # Padding has weight zero, so it adds nothing.
    padded = [jnp.pad(x, [(0, 0), (0, size * chunks - t)] + [(0, 0)] * (x.ndim - 2)) for x in inputs]
    pieces = tuple(rearrange(x, "b (n t) ... -> n b t ...", n=chunks) for x in padded)
    if partitioning.mesh_in_use() is None:  # on a mesh devices go together: what one could pass over another could not
        function = _unless_weightless(function)
    carry, out = jax.lax.scan(function, start, pieces)
    if out is not None:
        out = rearrange(out, "n b t d -> b (n t) d")[:, :t]
    return carry, out
