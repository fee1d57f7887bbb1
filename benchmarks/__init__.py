"""Speed and memory, measured: each script prints its figures beside a target or a baseline and takes `--json`."""
