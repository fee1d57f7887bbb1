"""The hybrid key/value cache: chunked layers hold one chunk, global layers the full length.

For Scout at a context of 10M tokens that is a quarter of the layers with a long cache, and 36 layers with 8,192 slots.
Numbers are float, or int8 with a scale for each token and head: half of bfloat16's bytes, and 4 more for a scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llama4_jax.config import Attention, LayerKind, TextConfig, layer_kinds
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.nn.attention import LayerCache


@struct.dataclass
class Cache:
    """Everything that a next call needs to know of the tokens so far.

    period: a LayerCache for each layer of the repeating period, leaves with a leading axis of repetitions;
    tail: a LayerCache for each leftover layer; lengths: [b] int32, tokens cached in each row;
    capacity: tokens that a row can hold.
    """

    period: tuple[LayerCache, ...]
    tail: tuple[LayerCache, ...]
    lengths: jax.Array
    capacity: int = struct.field(pytree_node=False)

    def check_room(self, new: int) -> None:
        """Raises ValueError if `new` more tokens do not fit in each row; cannot see lengths, nor raise, under jit."""
        if isinstance(self.lengths, jax.core.Tracer):
            return
        longest = int(jnp.max(self.lengths))
        if longest + new > self.capacity:
            raise ValueError(
                f"{new} tokens after {longest} cached ones exceed the cache's capacity of {self.capacity}; "
                f"make it with init_cache(length={longest + new}) or more"
            )

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def init_cache(config: TextConfig, periods: int, batch: int, length: int, dtype) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens, for a decoder that scans `periods` periods.

    dtype: of the numbers, a float one of 16 bits or more, or int8. Raises ValueError for any other, and for a length that the
    model is not made for.
    """
    if not 0 < length <= config.context_length:
        raise ValueError(
            f"a cache of {length} tokens was asked for, but context_length={config.context_length}; ask for 1 to that "
            "many, or raise it with text.context_length"
        )
    attention, kinds = config.attention, layer_kinds(config)

    def layer(kind: LayerKind, *leading: int) -> LayerCache:
        slots = min(attention.chunk_size, length) if kind.attention is Attention.CHUNKED else length
        shape = (*leading, batch, attention.num_kv_heads, slots, attention.head_dim)
        return LayerCache(keys=_empty(shape, dtype), values=_empty(shape, dtype))

    scanned = periods * config.period
    return Cache(
        period=tuple(layer(kind, periods) for kind in kinds[: min(scanned, config.period)]),
        tail=tuple(layer(kind) for kind in kinds[scanned:]),
        lengths=jnp.zeros(batch, jnp.int32),
        capacity=length,
    )


def _empty(shape: tuple[int, ...], dtype) -> jax.Array | QuantizedArray:
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        return QuantizedArray(jnp.zeros(shape, dtype), jnp.ones((*shape[:-1], 1), jnp.float32))
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ValueError(f"a cache of {dtype} was asked for; use float32, bfloat16, or int8, which comes with scales")
    return jnp.zeros(shape, dtype)
