"""Ask a multimodal checkpoint about pictures, in its chat format; the answer streams.

Claim:     none; this is how to ask a released checkpoint what it sees.
Command:   python -m experiments.describe --model Llama-4-Scout/ --image dog.jpg --prompt "What is this?" --dtype bfloat16
           python -m experiments.describe --model Llama-4-Scout/ --image a.png --image b.png --prompt "What changed?"
Wall time: seconds for a small model.

Pictures are cut into tiles as the released models were trained to see them, and stand before the prompt.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags

from experiments import output, speaking
from llama4_jax.data import images
from llama4_jax.tokenizer import chat

PROMPT = flags.DEFINE_string("prompt", "Describe what you see.", "what the user says")
SYSTEM = flags.DEFINE_string("system", None, "what the system message says; default: there is none")
IMAGE = flags.DEFINE_multi_string("image", [], "a picture; repeat the flag for more")
MAX_TILES = flags.DEFINE_integer("max_tiles", 16, "tiles that a picture is cut into at most", lower_bound=1)


def main(_) -> None:
    tokenizer, model = speaking.open_checkpoint()
    vision = model.config.vision
    if IMAGE.value:
        speaking.check_sees(model)
        if tokenizer.special["patch"] != model.config.patch_token:
            raise app.UsageError(
                f"the tokenizer marks pictures with id {tokenizer.special['patch']}, the model with "
                f"{model.config.patch_token}; give the tokenizer that belongs to the model with --tokenizer"
            )

    def tile(path):
        return images.tile(images.read(path), vision.image_size, MAX_TILES.value)

    parts = [{"type": "image", "image": path} for path in IMAGE.value] + [{"type": "text", "text": PROMPT.value}]
    system = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    per_tile = vision.tokens_per_tile if vision else 1
    messages = [*system, {"role": "user", "content": parts}]
    dialog = chat.encode_dialog(tokenizer, messages, tile=tile, tokens_per_tile=per_tile)
    tiles = np.concatenate(dialog.images) if dialog.images else None
    said = speaking.say(model, tokenizer, dialog.tokens, tiles)
    if output.JSON.value:
        output.finish({"prompt": PROMPT.value} | said)


if __name__ == "__main__":
    app.run(main)
