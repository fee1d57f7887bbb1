"""What tests and benchmarks share: error budgets, tiny models, oracles. No program of the library imports this."""
