"""Llama 4: text and pictures in one stream, through one decoder.

    tokens -> embeddings -> image features at the placeholders -> decoder -> norm -> logits

Source: "The Llama 4 herd" (Meta, 2025) and its published configurations; equal to transformers' and Meta's code to
fp32 rounding in prefill, and to transformers' cached decode (see docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh

from llama4_jax.config import Llama4Config
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.attention import Layout, Rows, layout
from llama4_jax.model import fusion, pictures
from llama4_jax.model.cache import Cache, init_cache
from llama4_jax.model.decoder import Decoder
from llama4_jax.model.vision import VisionTower
from llama4_jax.nn import rope, spread
from llama4_jax.nn.attention import Context
from llama4_jax.nn.linear import Embedding, Linear
from llama4_jax.nn.norm import RMSNorm


@struct.dataclass
class Output:
    """logits [b t v] float32; the cache, if one went in; aux, router statistics stacked over MoE layers."""

    logits: jax.Array
    cache: Cache | None
    aux: dict[str, jax.Array]


@struct.dataclass
class Hidden:
    """hidden [b t d], after the last norm: what the unembedding turns into logits; cache and aux as in Output."""

    hidden: jax.Array
    cache: Cache | None
    aux: dict[str, jax.Array]


class Llama4(nnx.Module):
    """The model. Its weights may have any float dtype; it computes in the dtype of its weights.

    `scan` stacks the repeating layers (compile time independent of depth); without it every layer stands alone, which
    is what decoding on a CPU wants, because indexing a stack copies a layer's weights.
    """

    def __init__(self, config: Llama4Config, *, rngs: nnx.Rngs, dtype=jnp.float32, scan: bool = True):
        text = config.text
        self.config = config
        self.embed = Embedding(text.vocab_size, text.embed_dim, rngs=rngs, dtype=dtype)
        self.vision = VisionTower(config.vision, text.embed_dim, rngs=rngs, dtype=dtype) if config.vision else None
        self.decoder = Decoder(text, rngs=rngs, dtype=dtype, scan=scan)
        self.norm = RMSNorm(text.embed_dim, eps=text.norm_eps, dtype=dtype)
        d, v = text.embed_dim, text.vocab_size
        self.head = None if text.tie_embeddings else Linear((d,), (v,), ("embed", "vocab"), rngs=rngs, dtype=dtype)

    def __call__(
        self,
        tokens: jax.Array,
        images: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Next-token logits for tokens [b t] int32.

        images: [n h w c] float in [-1, 1], tiles in order of appearance over the flattened batch.
        segments: [b t] int32, the document of each token, 0 for padding; default: one document a row, no padding.
        positions: [b t] int32 from 0 in each document; default: counted from the segments, or from the cache.
            On a mesh whose placement has rows in another order they must be given: see `kernels.attention.lay_out`.
        cache: from `init_cache` or from a call before; a cached row is one document, and its segments tell padding
            (0) from tokens only.
        """
        output = self.hidden(tokens, images, positions, segments, cache)
        with jax.named_scope("unembed"):
            logits = self.unembed(output.hidden)
        return Output(logits=logits, cache=output.cache, aux=output.aux)

    def hidden(
        self,
        tokens: jax.Array,
        images: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        remat: bool | Callable | None = None,
    ) -> Hidden:
        """All of the model but the unembedding, which a loss may want to do in pieces. Arguments as in `__call__`."""
        _check(tokens, positions, segments, cache)
        x = self.embedded(tokens, images, cache, remat=bool(remat))
        context = self.context(tokens.shape, positions, segments, cache)
        # Rows of one document begin at its position 0, so that its chunks begin at multiples of their size.
        with partitioning.promised(aligned=positions is None and segments is None):
            x, cache, aux = self.decoder(x, context, cache, remat=remat)
        if cache is not None:
            after = jnp.maximum(context.lengths, jnp.max(context.positions, axis=1) + 1)
            cache = cache.replace(lengths=after)
        return Hidden(hidden=self.norm(x), cache=cache, aux=aux)

    def embedded(
        self, tokens: jax.Array, images: jax.Array | None = None, cache: Cache | None = None, remat: bool = False
    ) -> jax.Array:
        """What the decoder reads, [b t d]: the embeddings of tokens [b t], with features of images at their placeholders."""
        with jax.named_scope("embed"):
            x = self.embed(tokens)
        return x if images is None else self._fuse(x, tokens, images, cache, remat)

    def context(self, shape, positions=None, segments=None, cache: Cache | None = None) -> Context:
        """Where each token of a call of shape (b, t) stands; see `__call__`."""
        rows = Rows.PLAIN if positions is None and segments is None and cache is None else Rows.ANY
        segments = jnp.ones(shape, jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32)
        layout.require_positions(positions, Layout.in_use())
        if positions is None:
            positions = _count(segments)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        positions = jnp.where(segments != 0, jnp.asarray(positions, jnp.int32), -1)
        turns = rope.turns(rope.text_angles(self.config.text.attention, positions))
        return Context(positions, segments, turns, cache.lengths if cache is not None else None, rows)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [.. v] float32 of hidden states [.. d]."""
        if self.head is not None:
            return self.head(hidden, dtype=jnp.float32)
        return self.embed.unembed(hidden)

    def unembedding(self) -> jax.Array | QuantizedArray:
        """The output matrix, [d v], for a loss that multiplies with it piece by piece."""
        if self.head is not None:
            return self.head.kernel[...]
        return jax.tree.map(jnp.transpose, self.embed.table[...])

    def init_cache(self, batch: int, length: int, dtype=None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens.

        dtype: of its numbers, by default the weights'; "int8" comes with a scale for each token and head.
        """
        dtype = dtype or self.embed.table.dtype
        return init_cache(self.config.text, self.decoder.periods, batch, length, dtype)

    def unrolled(self) -> Llama4:
        """The same model with every layer standing alone (`scan=False`); itself if it is that already."""
        if not self.decoder.periods:
            return self
        plain = jax.eval_shape(lambda: Llama4(self.config, rngs=nnx.Rngs(0), scan=False))
        held = {name: leaf for name, leaf in names.held(self).items() if not name.startswith("decoder.period.")}
        for i, block in enumerate(self.decoder.layers()):
            held |= {f"decoder.tail.{i}.{name}": leaf for name, leaf in names.held(block).items()}
        structure, known = names.split(plain)
        extra = [name for name in held if name not in known]
        if extra:
            raise ValueError(f"an unrolled model has no place for {extra[0]}; merge adapters first (model.lora.merge)")
        return structure.merge(held)

    def _fuse(
        self, x, tokens: jax.Array, images: jax.Array, cache: Cache | None = None, remat: bool = False
    ) -> jax.Array:
        if self.vision is None:
            raise ValueError(f"got images {images.shape}, but this model has no vision tower (config.vision is None)")
        placeholders = tokens == self.config.patch_token
        mesh = partitioning.mesh_in_use()
        if mesh is None or cache is not None:
            with jax.named_scope("fuse"):
                return fusion.fuse(x, self.vision(images, remat), placeholders, Layout.in_use())
        # Without a cache it is training, as in the decoder: pictures are dealt out, and weights lie in shards.
        features = spread.marked(self.vision, pictures.DEALT)(pictures.deal(mesh, images), remat)
        with jax.named_scope("fuse"):
            return pictures.deliver(mesh, x, features, placeholders, images.shape[0])


def initialise(
    config: Llama4Config,
    *,
    seed: int = 0,
    dtype=jnp.float32,
    scan: bool = True,
    mesh: Mesh | None = None,
    placement: Placement = partitioning.TRAIN,
) -> Llama4:
    """A model with random weights, the same for a seed whatever the mesh, to rounding.

    With a `mesh` each device draws its own shards and never holds a whole parameter.
    """
    make = lambda: Llama4(config, rngs=nnx.Rngs(seed), dtype=dtype, scan=scan)  # noqa: E731
    if mesh is None:
        return make()
    places = partitioning.shardings(jax.eval_shape(make), placement, mesh)
    return jax.jit(make, out_shardings=places)()


def _count(segments: jax.Array) -> jax.Array:
    """Position of each token in its document: 0, 1, ... from wherever the segment changes; [b t]."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _check(tokens, positions, segments, cache) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch time], got shape {tokens.shape}; add a batch axis with tokens[None]")
    for name, array in (("positions", positions), ("segments", segments)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens {tokens.shape}, got {array.shape}")
    if cache is not None and cache.lengths.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"the cache has {cache.lengths.shape[0]} rows but tokens have {tokens.shape[0]}; "
            "make it with init_cache(batch=...) of the same batch"
        )
    if cache is not None and segments is None and positions is None:
        cache.check_room(tokens.shape[1])
