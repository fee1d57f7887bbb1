"""How a device's queries and keys are laid out for the kernels of a remote ring, and which pairs of blocks may meet.

Queries are cut into blocks, and the heads that read one key-value head are rows of one matrix. Keys of one head are cut into
blocks, and a few blocks make a panel, which is what is copied to VMEM at once. All cutting is on leading axes, so a kernel
takes a block by its index alone.

The mask is `mask.visible`, told to a kernel as an interval: a query sees keys of its segment whose position is from
`first`, where its chunk begins, to `last`, its own. A query that sees nothing has an empty interval, and a key that nobody
sees the position -1. Chunks thus need no division in the kernel.
"""

from __future__ import annotations

import dataclasses
import math

import einops
import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.kernels.attention import blocks
from llama4_jax.kernels.attention.blocks import Blocking, Tokens

LARGEST = jnp.iinfo(jnp.int32).max
# A panel of 2048 keys is used for 1000 products a byte of queries' sums, which are read and written once for each panel.
PANEL_BLOCKS = 4
KEYS, ROWS = 512, 640  # keys of a block, and rows of queries times heads, whose scores are 1.3 MB in float32
LANES, SUBLANES = 128, 16  # of a tile of bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The sizes of one device's piece. Lengths are filled up to whole blocks and panels."""

    batch: int
    kv_heads: int
    group: int  # query heads that read one key-value head
    head_dim: int
    query_blocks: int
    query_size: int  # tokens of a block of queries
    panels: int
    panel_blocks: int
    key_size: int  # keys of a block

    @property
    def steps(self) -> int:
        """Panels of all rows and heads, which a kernel takes one by one."""
        return self.batch * self.kv_heads * self.panels

    @property
    def rows(self) -> int:
        """Of a block of queries: those of all heads of a group, one head after the other."""
        return self.group * self.query_size

    @property
    def panel(self) -> tuple[int, ...]:
        """The shape of a panel of keys, but for head_dim."""
        return (self.panel_blocks, self.key_size)

    @property
    def panel_tokens(self) -> tuple[int, ...]:
        return (self.panel_blocks, 2, self.key_size)

    def split_queries(self, array: jax.Array) -> jax.Array:
        """[b t n h] -> [(b k) blocks rows h]."""
        padded = blocks.pad(array, self.query_size)
        return einops.rearrange(padded, "b (q t) (k g) h -> (b k) q (g t) h", t=self.query_size, g=self.group)

    def join_queries(self, array: jax.Array, length: int) -> jax.Array:
        """The inverse of `split_queries`, filling dropped."""
        sizes = {"b": self.batch, "g": self.group}
        return einops.rearrange(array, "(b k) q (g t) h -> b (q t) (k g) h", **sizes)[:, :length]

    def split_statistics(self, array: jax.Array) -> jax.Array:
        """Numbers of each query and head, [b t n x] -> [(b k) blocks x rows]: as columns each would fill a lane tile."""
        return self.split_queries(array).swapaxes(-1, -2)

    def join_statistics(self, array: jax.Array, length: int) -> jax.Array:
        """The inverse of `split_statistics`, filling dropped."""
        return self.join_queries(array.swapaxes(-1, -2), length)

    def split_keys(self, array: jax.Array) -> jax.Array:
        """[b s k h] -> [(b k panels) blocks size h]."""
        padded = blocks.pad(array, self.panel_blocks * self.key_size)
        return einops.rearrange(padded, "b (p c s) k h -> (b k p) c s h", c=self.panel_blocks, s=self.key_size)

    def join_keys(self, array: jax.Array, length: int) -> jax.Array:
        """The inverse of `split_keys`, filling dropped."""
        sizes = {"b": self.batch, "k": self.kv_heads}
        return einops.rearrange(array, "(b k p) c s h -> b (p c s) k h", **sizes)[:, :length]

    def query_tokens(self, queries: Tokens, chunk_size: int | None) -> jax.Array:
        """First and last visible position, and segment; int32 [b blocks size 3]."""
        positions, segments = (blocks.pad(x, self.query_size) for x in queries)
        first = jnp.zeros_like(positions) if chunk_size is None else positions // chunk_size * chunk_size
        live = (segments != 0) & (positions >= 0)
        columns = (jnp.where(live, first, 1), jnp.where(live, positions, 0), segments)
        columns = jnp.stack(columns, axis=-1).astype(jnp.int32)  # [b t 3]
        return einops.rearrange(columns, "b (q t) x -> b q t x", t=self.query_size)

    def key_tokens(self, keys: Tokens) -> jax.Array:
        """Position, and segment; int32 [(b panels) blocks 2 size]."""
        positions, segments = (blocks.pad(x, self.panel_blocks * self.key_size) for x in keys)
        rows = jnp.stack((jnp.where(segments != 0, positions, -1), segments)).astype(jnp.int32)  # [2 b s]
        return einops.rearrange(rows, "x b (p c s) -> (b p) c x s", c=self.panel_blocks, s=self.key_size)


def choose(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> Blocking:
    """Block sizes that fill the matrix unit and are whole tiles of bfloat16 and float32.

    Args:
        query_shape: (b, t, n, h).
        key_shape: (b, s, k, h).
    """
    group = query_shape[2] // key_shape[2]
    smallest = max(SUBLANES, LANES // math.gcd(group, LANES))  # rows fill lanes when they are turned
    queries = max(smallest, 2 ** math.floor(math.log2(max(ROWS / group, 1))))
    length = math.ceil(query_shape[1] / smallest) * smallest
    keys = math.ceil(key_shape[1] / LANES) * LANES
    return Blocking(queries=min(queries, length), keys=min(keys, KEYS), chunk_size=None)


def cut(query_shape: tuple[int, ...], key_shape: tuple[int, ...], blocking: Blocking) -> Cut:
    """How pieces of these shapes are cut; as `choose`."""
    batch, length, heads, head_dim = query_shape
    kv_heads = key_shape[2]
    key_blocks = math.ceil(key_shape[1] / blocking.keys)
    panels = math.ceil(key_blocks / PANEL_BLOCKS)
    return Cut(
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        query_blocks=math.ceil(length / blocking.queries),
        query_size=blocking.queries,
        panels=panels,
        panel_blocks=math.ceil(key_blocks / panels),
        key_size=blocking.keys,
    )


def visible(query_tokens: jax.Array, key_tokens: jax.Array) -> jax.Array:
    """`mask.visible` of one block of queries [t 3] and one of keys [2 s]; bool [t s]."""
    first, last, document = (query_tokens[:, i : i + 1] for i in range(3))
    positions, segments = (key_tokens[i : i + 1] for i in range(2))
    return (first <= positions) & (positions <= last) & (document == segments)


def query_extent(tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Lowest first and highest last position, lowest and highest segment, of the live queries of a block [t 3]."""
    first, last, document = (tokens[:, i : i + 1] for i in range(3))
    live = first <= last
    return _lowest(first, live), _highest(last, live), _lowest(document, live), _highest(document, live)


def key_extent(tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Lowest and highest position, lowest and highest segment, of the live keys of a block [2 s]."""
    positions, segments = (tokens[i : i + 1] for i in range(2))
    live = positions >= 0
    return _lowest(positions, live), _highest(positions, live), _lowest(segments, live), _highest(segments, live)


def meet(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> jax.Array:
    """Whether two blocks may have a visible pair, from their extents; never false where there is one."""
    rule = (queries[0] <= keys[1]) & (keys[0] <= queries[1])
    return rule & (queries[2] <= keys[3]) & (keys[2] <= queries[3])


def _lowest(numbers: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.min(jnp.where(live, numbers, LARGEST))


def _highest(numbers: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(live, numbers, -LARGEST))


def scores(cut: Cut, query: jax.Array, key: jax.Array, query_tokens: jax.Array, key_tokens: jax.Array):
    """query . key / sqrt(h) of a block [rows h] and a block [s h], -inf where unseen; float32 [rows s]."""
    rule = visible(query_tokens, key_tokens)  # [t s]
    found = product(query, key, 1, 1) * cut.head_dim**-0.5
    found = jnp.where(rule, found.reshape(cut.group, *rule.shape), -jnp.inf)
    return found.reshape(cut.rows, -1)


def product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """The matrix product over one axis of each, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def as_row(column: jax.Array) -> jax.Array:
    """[rows 1] -> [1 rows], through a tile that is turned as a whole."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def as_column(row: jax.Array) -> jax.Array:
    """[1 rows] -> [rows 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
