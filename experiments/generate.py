"""Continue a prompt, with a picture if you like, by one of our runs or a Hugging Face Llama 4 folder; text streams.

Claim:     none; this is how to look at what a checkpoint says.
Command:   python -m experiments.generate --model runs/nano --prompt "English:" --image apple.png
           python -m experiments.generate --model Llama-4-Scout/ --prompt "The capital of France is" --temperature 0.6
Wall time: seconds for a nano run.

A picture fills one tile, resized to a square, and stands before the prompt.
"""

from __future__ import annotations

import pathlib

import jax
from absl import app, flags, logging
from flax import nnx
from PIL import Image

from experiments import output
from llama4_jax import checkpoint, infer
from llama4_jax import config as configs
from llama4_jax import tokenizer as tokenizers
from llama4_jax.checkpoint import store
from llama4_jax.core import names
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.images import to_tile
from llama4_jax.model import Llama4

MODEL = flags.DEFINE_string("model", "runs/nano", "folder of a run of ours, or in Hugging Face's layout")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tiktoken-format file; default: tokenizer.model in the folder")
PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
IMAGE = flags.DEFINE_string("image", None, "picture to look at")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "tokens to add at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together reach this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")


def load(folder: pathlib.Path, dtype: str) -> Llama4:
    """The model of a run of ours (it has `checkpoints`), or of a Hugging Face folder."""
    if not (folder / "checkpoints").is_dir():
        return checkpoint.load_hf(folder, dtype=dtype)
    params, records = store.load_params(folder / "checkpoints")
    config = configs.from_dict(configs.Llama4Config, records["model_config"])
    structure, _ = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))
    return structure.merge({name: array.astype(dtype) for name, array in params.items()})


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    path = pathlib.Path(TOKENIZER.value) if TOKENIZER.value else folder / "tokenizer.model"
    if not path.is_file():
        raise app.UsageError(f"no tokenizer at {path}; give its tiktoken-format file with --tokenizer")
    return tokenizers.load(path)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # what libraries report of their work would cut the text in pieces
    folder = pathlib.Path(MODEL.value)
    tokenizer, model = load_tokenizer(folder), load(folder, DTYPE.value)
    opening, images = [tokenizer.bos], None
    if IMAGE.value:
        if model.config.vision is None:
            raise app.UsageError(f"{folder} is a text-only model; leave out --image")
        opening = PictureGrammar(tokenizer, model.config.vision.tokens_per_tile).opening
        images = to_tile(Image.open(IMAGE.value), model.config.vision.image_size)[None]
    sampler = infer.Sampler(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    stop = tuple({*tokenizer.stop, *model.config.stop_tokens})
    prompt = opening + tokenizer.encode(PROMPT.value)
    options = {"max_new_tokens": MAX_NEW_TOKENS.value, "images": images, "stop": stop}
    print(PROMPT.value, end="", flush=True)
    new, shown = [], ""
    for token in infer.stream(model, prompt, **options, sampler=sampler, seed=SEED.value):
        new.append(token)
        text = tokenizer.decode([t for t in new if t not in stop])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: the next token completes it
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    if output.JSON.value:
        output.finish({"prompt": PROMPT.value, "text": shown, "tokens": new})


if __name__ == "__main__":
    app.run(main)
