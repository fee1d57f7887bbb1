"""Prefill a batch of prompts of unequal lengths, then decode with the cache until a stop token or a limit.

Prompts are left-padded to a common length, which changes no result: positions, chunks and temperature follow the true
position of each token. Lengths are rounded up, so that few programs are compiled.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llama4_jax.core import names, partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.infer import matrices, options
from llama4_jax.infer.sampling import GREEDY, Sampler
from llama4_jax.kernels import few_rows
from llama4_jax.model import Cache, Llama4, fusion, lora
from llama4_jax.nn.attention import DecoderAttention, FusedAttention
from llama4_jax.nn.linear import Embedding, Linear, TransposedLinear, alike, packed
from llama4_jax.nn.moe import Experts, TransposedExperts

ROUND_TO = 32  # prompt and cache lengths are multiples of this

logger = logging.getLogger(__name__)


@struct.dataclass
class State:
    """A batch in the middle of generation.

    tokens [b] int32, the newest of each row, not in the cache yet; written [b n] int32, all new ones so far;
    count [] int32, how many those are; done [b] bool, rows that have met a stop token; key, of the next draw.
    """

    cache: Cache
    tokens: jax.Array
    written: jax.Array
    count: jax.Array
    done: jax.Array
    key: jax.Array


def prepare(model: Llama4) -> Llama4:
    """The same model with its weights laid out for decoding: `generate` does this on each call, so do it once.

    Adapters are merged and layers stand alone. On one CPU the decoder's matrices are transposed and moved into large pages;
    those of few bits are packed. Anywhere else weights become matrices that each device reads as they lie
    (`infer.matrices`), for the mesh in use. Each costs a copy of the weights.
    """
    _report_merged(_merged_into_floats(model))
    model = lora.merge(model).unrolled()
    if partitioning.platform() != "cpu" or partitioning.mesh_in_use():
        return matrices.laid_out(model)

    def lay_out(path, node):
        if type(node) is DecoderAttention:
            return FusedAttention(node)
        if type(node) is Linear and not _in_vision(path):  # pictures are many rows
            return TransposedLinear(node)
        if type(node) is Embedding:
            return packed(node)
        return TransposedExperts(node) if type(node) is Experts else node

    prepared = jax.tree.map_with_path(lay_out, model, is_leaf=_laid_out_whole)
    for leaf in jax.tree.leaves(prepared):
        few_rows.large_pages.use(leaf)
    return prepared


def generate(
    model: Llama4,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    images: jax.Array | None = None,
    stop: Sequence[int] = (),
    sampler: Sampler = GREEDY,
    seed: int = 0,
    cache_dtype: str | None = None,
) -> list[list[int]]:
    """New token ids for each prompt; greedy by default.

    images: [n h w c], tiles in order of appearance over the prompts. A row ends early only after an id in `stop`, which
    it includes. cache_dtype: as for `Llama4.init_cache`. Raises ValueError for an empty prompt or an id outside the vocabulary.
    """
    model = prepare(model)
    state = _start(model, prompts, max_new_tokens, images, tuple(stop), sampler, seed, cache_dtype)
    state = _decode(model, state, max_new_tokens - 1, tuple(stop), sampler)
    return [_until_stop(row, stop) for row in np.asarray(state.written).tolist()]


def stream(
    model: Llama4,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    images: jax.Array | None = None,
    stop: Sequence[int] = (),
    sampler: Sampler = GREEDY,
    seed: int = 0,
    cache_dtype: str | None = None,
) -> Iterator[int]:
    """The ids that `generate` would return for one prompt, each as soon as it is known."""
    model = prepare(model)
    state = _start(model, [prompt], max_new_tokens, images, tuple(stop), sampler, seed, cache_dtype)
    for step in range(max_new_tokens):
        token = int(state.tokens[0])
        yield token
        if token in stop or step + 1 == max_new_tokens:
            return
        state = _decode(model, state, 1, tuple(stop), sampler)


def _start(
    model: Llama4, prompts, max_new_tokens: int, images, stop, sampler: Sampler, seed: int, cache_dtype
) -> State:
    """Runs the prompts through the model and draws the first new token of each."""
    _check(model, prompts, max_new_tokens, images)
    longest = max(len(prompt) for prompt in prompts)
    time, patch = _round_up(longest), model.config.patch_token
    tokens = np.full((len(prompts), time), 1 if patch == 0 else 0, np.int32)  # padding is no placeholder
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, time - len(prompt) :] = prompt
        segments[row, time - len(prompt) :] = 1
    capacity = min(_round_up(longest + max_new_tokens), model.config.text.context_length)
    key = jax.random.key(seed)
    logits, cache = _prefill(model, tokens, segments, images, capacity, cache_dtype)
    return _first(logits, cache, key, max_new_tokens, stop, sampler)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _prefill(model: Llama4, tokens, segments, images, capacity: int, cache_dtype) -> tuple[jax.Array, Cache]:
    """Logits [b v] after the last token of each prompt, and the cache that holds the prompts."""
    cache = model.init_cache(tokens.shape[0], capacity, cache_dtype)
    output = model.hidden(tokens, images, segments=segments, cache=cache)
    return model.unembed(output.hidden[:, -1]), output.cache


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _first(logits, cache: Cache, key, max_new_tokens: int, stop: tuple[int, ...], sampler: Sampler) -> State:
    key, draw = jax.random.split(key)
    tokens = sampler(logits, draw)
    written = jnp.zeros((tokens.shape[0], max_new_tokens), jnp.int32).at[:, 0].set(tokens)
    count = jnp.ones((), jnp.int32)
    return State(cache=cache, tokens=tokens, written=written, count=count, done=_is_stop(tokens, stop), key=key)


def _decode(model: Llama4, state: State, steps: int, stop: tuple[int, ...], sampler: Sampler) -> State:
    """At most `steps` more tokens for each row; fewer when all rows are done."""
    return _loop(partitioning.platform())(model, state, steps, stop, sampler)


@functools.cache
def _loop(platform: str):
    return jax.jit(_run, static_argnums=(3, 4), donate_argnums=1, compiler_options=options.known(platform))


def _run(model: Llama4, state: State, steps: int, stop: tuple[int, ...], sampler: Sampler) -> State:
    end = state.count + steps

    def step(state: State) -> State:
        output = model.hidden(state.tokens[:, None], cache=state.cache)
        key, draw = jax.random.split(state.key)
        tokens = sampler(model.unembed(output.hidden[:, -1]), draw)
        return State(
            cache=output.cache,
            tokens=tokens,
            written=state.written.at[:, state.count].set(tokens),
            count=state.count + 1,
            done=state.done | _is_stop(tokens, stop),
            key=key,
        )

    return jax.lax.while_loop(lambda state: (state.count < end) & ~jnp.all(state.done), step, state)


def _laid_out_whole(node) -> bool:
    if type(node) is DecoderAttention:  # its products are one, if they can be
        return alike(node.query, node.key, node.value)
    return type(node) in (Linear, Experts, Embedding)


def _merged_into_floats(model: Llama4) -> int:
    """Weights in few bits that have adapters."""
    deltas = lora.deltas(model)
    held = names.held(model) if deltas else {}
    return sum(isinstance(held[name], QuantizedArray) for name in deltas)


@functools.cache
def _report_merged(count: int) -> None:
    if count:
        logger.warning("decoding reads %d weights as floats: few bits cannot hold the adapters merged into them", count)


def _in_vision(path) -> bool:
    return path[0].name == "vision"


def _is_stop(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(stop, jnp.int32))


def _until_stop(tokens: list[int], stop: Sequence[int]) -> list[int]:
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def _round_up(length: int) -> int:
    return -(-length // ROUND_TO) * ROUND_TO


def _check(model: Llama4, prompts, max_new_tokens: int, images) -> None:
    vocab_size, limit = model.config.text.vocab_size, model.config.text.context_length
    if len(prompts) == 0 or max_new_tokens < 1:
        raise ValueError(f"wanted at least one prompt and one new token, got {len(prompts)} and {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; start it with the model's begin-of-text token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {row} has ids outside 0 .. {vocab_size - 1}; was it made by another tokenizer?")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds "
                f"context_length={limit}; shorten it or ask for fewer"
            )
    if model.config.vision is not None:
        placeholders = sum(list(prompt).count(model.config.patch_token) for prompt in prompts)
        tiles = 0 if images is None else images.shape[0]
        fusion.check(placeholders, tiles * model.config.vision.tokens_per_tile)
