"""What several generators ask for in the same words: flags, and the command to run."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

NAME = flags.DEFINE_string("name", "llama4", "of the job: lower-case letters, digits and dashes")
SLICE = flags.DEFINE_string("slice", None, "TPU chip and topology, as v5p:4x4x8")
GRACE = flags.DEFINE_integer("grace", 120, "seconds to save and end in after SIGTERM", lower_bound=1)


def command(words: Sequence[str]) -> tuple[str, ...]:
    """`words`, the command after `--`; raises ValueError when there is none."""
    if not words:
        raise ValueError("wanted a command after `--`, such as python -m experiments.pretrain_nano --cluster; got none")
    return tuple(words)
