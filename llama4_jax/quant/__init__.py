"""Weights in few bits: which, how they are rounded, and how a model is trained for it."""
