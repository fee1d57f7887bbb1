"""Llama-4-class models in JAX: build, train, quantise, serve and evaluate.

Importing this package is free: no JAX, no device, no file is touched until a submodule is imported.
"""

__version__ = "0.1.0"
