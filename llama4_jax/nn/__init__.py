"""Flax modules, one idea a file. A module is a pytree: pass it straight through jit, grad, vmap and scan."""
