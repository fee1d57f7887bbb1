"""Causal, chunked, packed and cached attention under one mask rule; read `api`, `mask`, `reference`, then the rest."""
