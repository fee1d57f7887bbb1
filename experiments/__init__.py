"""One script per job or claim; run as `python -m experiments.NAME --flags`."""
