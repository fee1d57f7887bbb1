"""Text to token ids and back: byte-level BPE in tiktoken's file format, with the Llama 4 special tokens.

`chat` does it for dialogues, `tool_calls` reads and writes the calls in them. `train` makes a vocabulary, `expand` adds
to one, `fertility` measures how densely one writes a text.
"""

from llama4_jax.tokenizer import chat, fertility, tool_calls
from llama4_jax.tokenizer.bpe import Tokenizer, load
from llama4_jax.tokenizer.expand import expand
from llama4_jax.tokenizer.training import train

__all__ = ["Tokenizer", "chat", "expand", "fertility", "load", "tool_calls", "train"]
