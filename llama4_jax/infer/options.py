"""What a compiler is told of programs that decode, by platform."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

# In decoding one slot of a cache is written and all are read once. Left to itself the TPU's compiler does both in its fast
# memory, so that the whole cache is written back at each step; this is how little of what it copies there it may use.
DECODING = {"tpu": {"xla_tpu_msa_inefficient_use_to_copy_ratio": "1.0"}}

_logger = logging.getLogger(__name__)


@functools.cache
def known(platform: str) -> dict[str, str] | None:
    """The options of `platform`, if its compiler knows them, which other versions need not; says once where not."""
    options = DECODING.get(platform)
    try:
        jax.jit(jnp.negative, compiler_options=options)(jnp.zeros(()))
    except jax.errors.JaxRuntimeError as error:
        _logger.warning("decoding moves more bytes than it has to, since the compiler refuses an option: %s", error)
        return None
    return options
