"""Continue a prompt, with a picture if you like, by one of our runs or a Hugging Face Llama 4 folder; text streams.

Claim:     none; this is how to look at what a checkpoint says.
Command:   python -m experiments.generate --model runs/nano --prompt "English:" --image apple.png
           python -m experiments.generate --model Llama-4-Scout/ --prompt "The capital of France is" --temperature 0.6
Wall time: seconds for a nano run.

A picture fills one tile, resized to a square, and stands before the prompt.
"""

from __future__ import annotations

from absl import app, flags

from experiments import output, speaking
from llama4_jax.data import images
from llama4_jax.data.documents import PictureGrammar

PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
IMAGE = flags.DEFINE_string("image", None, "picture to look at")


def main(_) -> None:
    tokenizer, model = speaking.open_checkpoint()
    opening, tiles = [tokenizer.bos], None
    if IMAGE.value:
        speaking.check_sees(model)
        opening = PictureGrammar(tokenizer, model.config.vision.tokens_per_tile).opening
        tiles = images.to_tile(images.read(IMAGE.value), model.config.vision.image_size)[None]
    print(PROMPT.value, end="", flush=True)
    said = speaking.say(model, tokenizer, opening + tokenizer.encode(PROMPT.value), tiles)
    if output.JSON.value:
        output.finish({"prompt": PROMPT.value} | said)


if __name__ == "__main__":
    app.run(main)
