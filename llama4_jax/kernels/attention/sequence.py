"""Attention of a whole sequence to itself, as in training: by the platform's own kernel, on one device or over a mesh."""

from __future__ import annotations

import enum
import functools
import logging
from functools import partial

import jax

from llama4_jax.core import partitioning
from llama4_jax.kernels.attention import api, chunks, cudnn, neighbours, ring, splash, spread, triton
from llama4_jax.kernels.attention.layout import Layout

KERNELS = {"splash": splash, "cudnn": cudnn, "triton": triton}
"""Modules with an `attend` for a sequence to itself alone, and a `refusal` that says what it has not."""

PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
"""Of each platform the kernels that large calls use, the first that can do them."""

_logger = logging.getLogger(__name__)


class Rows(enum.Enum):
    """What is promised of the rows of a batch; ALIGNED and PLAIN give more kernels, and less work, to choose from."""

    ANY = "any"  # tokens of a document follow each other in the order of their positions, and no more
    ALIGNED = "aligned"  # besides, no chunk crosses a multiple of the chunk size in its row, see `Placement.aligned`
    PLAIN = "plain"  # every row is one document from its first token to its last


def attend_sequence(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    chunk_size: int | None,
    rows: Rows = Rows.ANY,
) -> jax.Array:
    """`attend` of a whole sequence to itself, spread over the mesh in use (`partitioning.use`) if there is one.

    Then rows, length and heads are cut as the placement in use says, and tokens lie as it says (`lay_out`). Keys of a
    layer without chunks travel round the devices that share a row; those of a chunked layer go no further than its chunks
    reach. What `rows` promises must be true: kernels of TPUs and GPUs rely on it, and so do chunked layers over several
    devices. Raises ValueError where a size is not divisible by the devices that share it.
    """
    tokens = {"query_positions": positions, "key_positions": positions}
    tokens |= {"query_segments": segments, "key_segments": segments}
    mesh, placement = partitioning.mesh_in_use(), partitioning.placement_in_use()
    if placement.aligned and rows is Rows.ANY:
        rows = Rows.ALIGNED
    if mesh is None:
        return attend_whole(query, key, value, **tokens, chunk_size=chunk_size, rows=rows)
    api.check(query, key, value, chunk_size)
    api.check_tokens("query", query, positions, segments)
    spec = partial(partitioning.spec, placement=placement, mesh=mesh)
    spec(("batch", "time", "kv_heads", "head_dim"), key.shape)  # keys are cut as queries are, and there are fewer heads
    queries, layout = spec(("batch", "time", "heads", "head_dim"), query.shape), Layout.of(placement, mesh)
    layout.check(query.shape[1])
    piece = query.shape[1] // layout.pieces
    if layout.devices == 1 or (chunk_size is not None and not layout.exchanges(piece, chunk_size)):
        # Nothing to send: what a device holds is whole rows, or whole chunks of them in the order of the row.
        spread_over = spread.over_mesh(partial(attend_whole, rows=rows), mesh, queries)
    elif chunk_size is None:
        spread_over = ring.over_mesh(mesh, queries, implementation=placement.ring)
    else:
        spread_over = neighbours.over_mesh(mesh, queries, layout)
    with jax.named_scope("attend"):
        return spread_over(query, key, value, **tokens, chunk_size=chunk_size)


def attend_whole(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
    rows: Rows = Rows.ANY,
) -> jax.Array:
    """As `api.attend` of one device's sequence to itself, by what `choose` says; rows: what is promised of them."""
    api.check(query, key, value, chunk_size)
    api.check_tokens("query", query, query_positions, query_segments)
    api.check_tokens("key", key, key_positions, key_segments)
    name = choose(partitioning.platform(), query.shape, key.shape, query.dtype, rows)
    attend = KERNELS[name].attend if name in KERNELS else api.IMPLEMENTATIONS[name]
    if name in KERNELS and rows is not Rows.ANY and chunk_size is not None and chunk_size < query.shape[1]:
        attend = chunks.apart(attend)
    with jax.named_scope("attend"):
        return attend(
            query,
            key,
            value,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=query_segments,
            key_segments=key_segments,
            chunk_size=chunk_size,
        )


@functools.lru_cache(maxsize=4096)
def choose(
    platform: str, query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype, rows: Rows = Rows.ANY
) -> str:
    """The implementation for a sequence to itself, logged once for each call that differs in these, with the reason.

    Args:
        platform: "cpu", "gpu" or "tpu".
        query_shape: (b, t, n, h).
        key_shape: (b, t, k, h).
        dtype: of all.
        rows: what is promised of them.
    """
    general, reason = api.by_size(query_shape, key_shape)
    if general != "blockwise":
        return api.choose(query_shape, key_shape)  # so few scores are not worth a kernel
    call = api.describe(query_shape, key_shape)
    for name in PREFERRED.get(platform, ()):
        refused = KERNELS[name].refusal(query_shape, key_shape, dtype)
        if name == "cudnn" and rows is not Rows.PLAIN:
            refused = "rows that may be packed or padded"
        if not refused:
            _logger.info("attention uses %s for %s: %s, on a %s", name, call, reason, platform)
            return name
        reason += f", and {name} does not do {refused}"
    _logger.info("attention uses %s for %s: %s", general, call, reason)
    return general
