"""Text to token ids and back: byte-level BPE in tiktoken's file format, with the Llama 4 special tokens."""

from llama4_jax.tokenizer.bpe import Tokenizer, load
from llama4_jax.tokenizer.training import train

__all__ = ["Tokenizer", "load", "train"]
