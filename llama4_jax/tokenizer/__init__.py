"""Text to token ids and back: byte-level BPE in tiktoken's file format, with the Llama 4 special tokens.

`chat` does it for dialogues, `tool_calls` reads and writes the calls in them.
"""

from llama4_jax.tokenizer import chat, tool_calls
from llama4_jax.tokenizer.bpe import Tokenizer, load
from llama4_jax.tokenizer.training import train

__all__ = ["Tokenizer", "chat", "load", "tool_calls", "train"]
