"""Turn a checkpoint into another layout, tensor by tensor: no machine is too small for it.

Claim:     peak memory stays below 1.5 GB more than the largest tensor's share, whatever the checkpoint's size.
Command:   python -m experiments.convert --from=hf --to=orbax --source=Llama-4-Scout/ --target=scout-orbax/
           python -m experiments.convert --from=orbax --to=hf_unfused --source=scout-orbax/ --target=scout-separate/
Wall time: seconds a gigabyte; `python -m benchmarks.convert_memory` measures it.
Expected:  the target holds the same bits; with --dtype, the same numbers rounded.

A conversion that was stopped goes on where it was when the same command is given again. "hf" is Hugging Face's layout
(reading sees for itself whether experts are fused; writing fuses them), "hf_unfused" has one linear layer an expert,
"meta" is read in either of its spellings and written under the names of Meta's modules, "orbax" is our own.

With --quant the weights that a recipe names are rounded to few bits on the way, a piece of a tensor at a time:
           python -m experiments.convert --from=hf --to=hf_unfused --quant=int4_experts --group=128 --source=... --target=...
writes what compressed-tensors reads, and --to=orbax our own packed form.
"""

from __future__ import annotations

import pathlib
import sys
import time

from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax.checkpoint import convert, hf
from llama4_jax.config.quant import PRESETS, QuantRecipe

FROM = flags.DEFINE_enum("from", None, convert.READ, "layout of the source", required=True)
TO = flags.DEFINE_enum("to", None, convert.WRITTEN, "layout of the target", required=True)
SOURCE = flags.DEFINE_string("source", None, "folder to read", required=True)
TARGET = flags.DEFINE_string("target", None, "folder to write; must not exist yet", required=True)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the weights; default: as stored")
SHARD_BYTES = flags.DEFINE_integer("max_shard_bytes", hf.SHARD_BYTES, "of a safetensors file of hf and hf_unfused")
QUANT = flags.DEFINE_enum("quant", None, list(PRESETS), "recipe of the weights to round to few bits")
GROUP = flags.DEFINE_integer("group", None, "inputs that share a scale; default: the recipe's own", lower_bound=1)
METHOD = flags.DEFINE_enum("method", "rtn", ["rtn", "clip"], "round to nearest, or in the best part of each range")
KEEP = flags.DEFINE_bool("keep_quantised", False, "weights that hf files have in few bits stay so")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the checkpoint that is at the target")


def main(_) -> None:
    output.quiet_libraries()
    try:
        run()
    except (OSError, ValueError, NotImplementedError) as error:
        sys.exit(f"not converted: {error}")


def run() -> None:
    """Converts what the flags name, and prints what was done."""
    conversion = convert.Conversion(
        source=pathlib.Path(SOURCE.value),
        target=pathlib.Path(TARGET.value),
        read=FROM.value,
        write=TO.value,
        dtype=DTYPE.value,
        max_shard_bytes=SHARD_BYTES.value,
        overwrite=OVERWRITE.value,
        recipe=recipe(),
        method=METHOD.value,
        keep_quantised=KEEP.value,
    )
    start = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc=f"{FROM.value} to {TO.value}", dynamic_ncols=True) as bar:

        def advance(progress: convert.Progress) -> None:
            bar.total = progress.total
            bar.set_postfix_str(progress.phase, refresh=False)
            bar.update(progress.done - bar.n)

        summary = convert.convert(conversion, advance)
    seconds = time.monotonic() - start
    output.finish(
        {
            "tensors": summary.tensors,
            "finished before": summary.resumed,
            "gigabytes": summary.bytes / 1e9,
            "seconds": seconds,
            "target": TARGET.value,
        }
    )


def recipe() -> QuantRecipe | None:
    """What --quant and --group ask for."""
    if QUANT.value is None:
        if GROUP.value is not None:
            raise ValueError("--group is of a recipe; name one with --quant")
        return None
    return PRESETS[QUANT.value](*([] if GROUP.value is None else [GROUP.value]))


if __name__ == "__main__":
    app.run(main)
