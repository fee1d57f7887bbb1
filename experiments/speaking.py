"""What scripts that let a checkpoint speak share: their flags, loading it, and showing its text as it comes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging
from flax import nnx

from llama4_jax import checkpoint, infer
from llama4_jax import config as configs
from llama4_jax import tokenizer as tokenizers
from llama4_jax.checkpoint import native, store
from llama4_jax.config.train import QatConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.train import qat

MODEL = flags.DEFINE_string("model", "runs/nano", "folder of a run, or a checkpoint: ours or Hugging Face's")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tiktoken-format file or tokenizer.json; default: that in the folder"
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "tokens to add at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together reach this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")


def open_checkpoint() -> tuple[tokenizers.Tokenizer, Llama4]:
    """The tokenizer and the model that the flags name."""
    logging.set_verbosity(logging.WARNING)  # what libraries report of their work would cut the text in pieces
    folder = pathlib.Path(MODEL.value)
    usual = [folder / "tokenizer.model", folder / "tokenizer.json"]
    path = pathlib.Path(TOKENIZER.value) if TOKENIZER.value else next(filter(pathlib.Path.is_file, usual), usual[0])
    if not path.is_file():
        raise app.UsageError(
            f"no tokenizer at {path}; give its tiktoken-format file or tokenizer.json with --tokenizer"
        )
    return tokenizers.load(path), load(folder, DTYPE.value)


def load(folder: pathlib.Path, dtype: str) -> Llama4:
    """The model of a run of ours (it has `checkpoints`), of our own layout (a manifest) or of a Hugging Face folder."""
    if (folder / native.MANIFEST).is_file():
        return native.load_native(folder, dtype=dtype)
    if not (folder / "checkpoints").is_dir():
        return checkpoint.load_hf(folder, dtype=dtype)
    params, records = store.load_params(folder / "checkpoints")
    config = configs.from_dict(configs.Llama4Config, records["model_config"])
    structure, _ = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))
    rounding = configs.from_dict(QatConfig, records["train_config"].get("qat", {}))
    params = qat.packed(params, rounding)  # as products saw them
    return structure.merge({name: array.astype(dtype) for name, array in params.items()})


def check_sees(model: Llama4) -> None:
    """Ends the script if the model takes no pictures."""
    if model.config.vision is None:
        raise app.UsageError(f"{MODEL.value} is a text-only model; leave out --image")


def say(model: Llama4, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], images) -> dict[str, Any]:
    """Prints what the model adds to `prompt` as it comes; returns that "text" and its "tokens".

    images: [n h w c] tiles, or None.
    """
    sampler = infer.Sampler(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    stop = tuple({*tokenizer.stop, *model.config.stop_tokens})
    options = {"max_new_tokens": MAX_NEW_TOKENS.value, "images": images, "stop": stop}
    new, printed = [], ""
    for token in infer.stream(model, prompt, **options, sampler=sampler, seed=SEED.value):
        new.append(token)
        text = tokenizer.decode([t for t in new if t not in stop])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: the next token completes it
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
    return {"text": printed, "tokens": new}
