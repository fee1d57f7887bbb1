"""Turn a trained model into one in few bits, without training it, and measure what that costs.

Claim:     GPTQ on some pages of text keeps an int4 model nearer to the model that it was, on text that neither has seen, than
           rounding to nearest does.
Command:   python -m experiments.quantize --model runs/nano --recipe int4_all --group 32 --output runs/nano_int4
           (a run of `pretrain_nano`, a checkpoint of ours or a Hugging Face folder, with a tokenizer.model)
Hardware:  2 CPU cores; some minutes for the nano model, most of them compiling.
Expected:  `divergence` below 0.8 of `rtn.divergence`, `agreement` above `rtn.agreement`.

Prints what share of parameters and bytes is quantised, how many calibration tokens each expert saw, loss before and after, how
often the likeliest token is the same, and the same of rounding to nearest. --output gets the quantised checkpoint, in the
layout of the model that went in. The text is Python's standard library, through the loader that training uses. A checkpoint
that does not fit in memory: `experiments.convert`.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import shutil
import sys
import time

from absl import app, flags

from experiments import output, speaking
from llama4_jax import checkpoint
from llama4_jax import tokenizer as tokenizers
from llama4_jax.checkpoint import native
from llama4_jax.config.data import DataConfig
from llama4_jax.config.quant import PRESETS, QuantRecipe
from llama4_jax.data import loader
from llama4_jax.model import Llama4
from llama4_jax.quant import ptq, quality, report
from llama4_jax.quant.coverage import Coverage

RECIPE = flags.DEFINE_enum("recipe", "int4_all", sorted(PRESETS), "what is rounded, and to what")
GROUP = flags.DEFINE_integer("group", 32, "inputs that share a scale; 0: one scale an output", lower_bound=0)
METHOD = flags.DEFINE_enum("method", "gptq", ptq.METHODS, "how; clip and gptq use calibration text")
OUTPUT = flags.DEFINE_string("output", None, "new folder for the quantised checkpoint; without it, figures alone")
ROWS = flags.DEFINE_integer("rows", 8, "rows of a batch of text", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 256, "tokens of a row", lower_bound=1)
CALIBRATION = flags.DEFINE_integer("calibration", 16, "batches of training text to calibrate on", lower_bound=1)
HELDOUT = flags.DEFINE_integer("heldout", 8, "batches of held-out text to measure on", lower_bound=1)
EXTRA_TOKENS = flags.DEFINE_integer(
    "extra_tokens", 0, "an expert that fewer calibration tokens chose is given more, up to so many", lower_bound=0
)


def batches(tok: tokenizers.Tokenizer, split: str, number: int) -> list[loader.Batch]:
    """So many batches of text, "train" or "heldout"."""
    seed = speaking.SEED.value
    data = DataConfig(seed=seed, images_per_batch=0, rows=ROWS.value, sequence_length=LENGTH.value)
    return list(itertools.islice(loader.make(data, tok, split), number))


def quantised(model: Llama4, rules: QuantRecipe, tok: tokenizers.Tokenizer) -> tuple[Llama4, Coverage | None]:
    """The model as the flags say, and how many tokens each expert saw if there was any text."""
    if METHOD.value == "rtn":
        return ptq.quantise(model, rules), None
    text = batches(tok, "train", CALIBRATION.value)
    return ptq.calibrated(model, rules, text, method=METHOD.value, extra_tokens=EXTRA_TOKENS.value)


def save(model: Llama4, folder: pathlib.Path) -> None:
    """Writes the checkpoint: in our own layout if --model is ours, else in Hugging Face's; and the tokenizer beside it."""
    source = pathlib.Path(speaking.MODEL.value)
    ours = (source / "checkpoints").is_dir() or (source / native.MANIFEST).is_file()
    (native.save_native if ours else checkpoint.save_hf)(model, folder)
    for name in ("tokenizer.model", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def main(_) -> None:
    output.quiet_libraries()
    try:
        run()
    except (OSError, ValueError, NotImplementedError) as error:
        sys.exit(f"not quantised: {error}")


def run() -> None:
    """Quantises what the flags name, measures it, saves it if asked to, and prints what was found."""
    start = time.monotonic()
    if OUTPUT.value and pathlib.Path(OUTPUT.value).exists():
        raise app.UsageError(f"{OUTPUT.value} is there already; name another folder with --output")
    tok, model = speaking.open_checkpoint()
    rules = PRESETS[RECIPE.value](GROUP.value or None)
    made, coverage = quantised(model, rules, tok)
    figures = report.report(made)
    print(report.table(figures))
    if coverage and coverage.chosen:
        print(f"\nCalibration tokens of each expert\n{coverage.table()}\n")
    unseen = batches(tok, "heldout", HELDOUT.value)
    results = {"recipe": rules.name, "group": GROUP.value, "method": METHOD.value, "seed": speaking.SEED.value}
    results |= {"report": figures} | dataclasses.asdict(quality.compare(model, made, unseen))
    if METHOD.value != "rtn":
        nearest = quality.compare(model, ptq.quantise(model, rules), unseen)
        results["rtn"] = {
            "loss_after": nearest.loss_after,
            "agreement": nearest.agreement,
            "divergence": nearest.divergence,
        }
    if coverage:
        results["coverage"] = coverage.to_dict()
    if OUTPUT.value:
        save(made, pathlib.Path(OUTPUT.value))
        print(f"{OUTPUT.value}: {RECIPE.value}")
    output.finish(results | {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    app.run(main)
