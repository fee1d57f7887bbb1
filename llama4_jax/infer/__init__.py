"""Generation: one batch of prompts at a time, all in one compiled loop, or token by token as a stream."""

from llama4_jax.infer.generate import generate, prepare, stream
from llama4_jax.infer.sampling import GREEDY, Sampler

__all__ = ["GREEDY", "Sampler", "generate", "prepare", "stream"]
