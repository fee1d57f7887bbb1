"""Give a checkpoint more tokens: learn new merges on top of its tokenizer, and rows for them from those of their parts.

Claim:     1,024 new tokens shorten the text they were learnt for, on held-out documents; the old ids stay, and rows that
           start as the mean of their parts cost the model less, and are trained sooner, than rows drawn at random.
Command:   python -m experiments.expand_vocabulary --model runs/nano --output runs/nano_expanded
           (a run of `pretrain_nano`, a checkpoint of ours or a Hugging Face folder, with a tokenizer.model)
Hardware:  2 CPU cores; 3 minutes for the nano model, 15 seconds with --steps 0.
Expected:  for the nano model 0.85 of the tokens, within 0.02; bits per byte with rows from their parts below those with
           random rows, by 0.05 or more before training and after 200 steps, and below the old vocabulary's after them.

--output gets the model before any training, to train on from, and its tokenizer.model: a Hugging Face folder if the
model came as one, else a checkpoint in our own layout. The text is Python's standard library, code and documentation.
Training is measured with the old vocabulary too, for as many steps of as many tokens; a denser vocabulary reads more
text in these.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from experiments import output, speaking
from llama4_jax import checkpoint
from llama4_jax import tokenizer as tokenizers
from llama4_jax.checkpoint import native
from llama4_jax.config.data import DataConfig
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names
from llama4_jax.data import documents, loader, packing, text
from llama4_jax.model import Llama4, vocabulary
from llama4_jax.tokenizer import slices
from llama4_jax.tokenizer.expand import parts
from llama4_jax.train import losses, pretrain

OUTPUT = flags.DEFINE_string("output", "runs/expanded", "new folder for the expanded checkpoint")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 1024, "tokens to add", lower_bound=1)
TEXT_BYTES = flags.DEFINE_integer("text_bytes", 4_000_000, "training text to learn from, of each kind, at most")
PIECES = flags.DEFINE_integer("pieces", 400, "pieces of held-out text to measure on", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 200, "training steps after which to measure again; 0: only before", lower_bound=0)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "the highest, of AdamW")

_PIECE = 400  # characters of a piece of held-out text, and at most as many more up to a place where no token is cut


def training_texts() -> Iterator[str]:
    for kind in text.KINDS:
        room = TEXT_BYTES.value
        for source in text.sources(kind, "train"):
            document = source.read()
            room -= len(document.encode())
            if room >= 0:
                yield document


def heldout_pieces() -> list[str]:
    """PIECES pieces of the held-out documents, spread over them."""
    read = (source.read() for kind in text.KINDS for source in text.sources(kind, "heldout"))
    every = [piece for document in read for piece in slices.parts(document, _PIECE, _PIECE)]
    return every[:: max(len(every) // PIECES.value, 1)][: PIECES.value]


def rows(tok: tokenizers.Tokenizer, pieces: Sequence[str]) -> list[packing.Row]:
    """One piece a row behind begin_of_text; each of its tokens is predicted."""
    encoded = [np.array(tok.encode(piece, bos=True), np.int32) for piece in pieces]
    return [[documents.Document(e[:-1], e[1:], np.ones(len(e) - 1, np.float32))] for e in encoded]


def bits_per_byte(
    model: Llama4, tok: tokenizers.Tokenizer, pieces: Sequence[str], length: int, batch: int = 16
) -> float:
    """-log2 of the probability of the pieces, cut as `tok` cuts them, over their bytes."""
    structure, params = names.split(model)
    config = TrainConfig(steps=1)

    @jax.jit
    def nats(params, arrays):
        return losses.next_token(structure.merge(params), arrays, None, config=config).sums["loss"]

    placed = rows(tok, pieces)
    total = sum(
        float(nats(params, packing.arrays((placed[i : i + batch] + [[]] * batch)[:batch], length)))
        for i in range(0, len(placed), batch)
    )
    return total / np.log(2) / sum(len(piece.encode()) for piece in pieces)


def trained(model: Llama4, tok: tokenizers.Tokenizer) -> Llama4:
    """`model` after STEPS steps on the training text, whose arrays it gives up."""
    data = DataConfig(seed=speaking.SEED.value, images_per_batch=0)
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE.value, warmup_steps=STEPS.value // 10)
    config = TrainConfig(steps=STEPS.value, optimizer=optimizer, balance_loss=0.01, save_every=STEPS.value, keep=1)
    with tempfile.TemporaryDirectory() as folder:
        return pretrain.run(model, loader.make(data, tok), config, folder=folder)


def save(model: Llama4, folder: pathlib.Path) -> None:
    """Writes the checkpoint to `folder`: in our own layout if --model is ours, else in Hugging Face's."""
    source = pathlib.Path(speaking.MODEL.value)
    ours = (source / "checkpoints").is_dir() or (source / native.MANIFEST).is_file()
    (native.save_native if ours else checkpoint.save_hf)(model, folder)


def main(_) -> None:
    output.quiet_libraries()
    old, model = speaking.open_checkpoint()
    if old.vocab_size != model.config.text.vocab_size:
        raise app.UsageError(
            f"the tokenizer has {old.vocab_size} ids, the model {model.config.text.vocab_size}; give the tokenizer that "
            "belongs to the model with --tokenizer"
        )
    folder = pathlib.Path(OUTPUT.value)
    if folder.exists():
        raise app.UsageError(f"{folder} is there already; name another folder with --output")
    new = tokenizers.expand(old, training_texts(), NEW_TOKENS.value, folder / "tokenizer.model")
    new_rows = {
        "parts": vocabulary.mean_of_parts(parts(old, new)),
        "random": vocabulary.drawn(NEW_TOKENS.value, speaking.SEED.value),
    }
    models = {"old": (old, model)} | {name: (new, vocabulary.grow(model, make)) for name, make in new_rows.items()}
    save(models["parts"][1], folder)
    print(
        f"{folder}: {old.vocab_size:,} + {NEW_TOKENS.value:,} ids, parts as {list(models['parts'][1].embed.table.shape)}"
    )

    pieces = heldout_pieces()
    length = max(len(row[0]) for row in rows(old, pieces))  # the new encoding of a text is never longer
    tokens = {name: sum(len(tok.encode(piece)) for piece in pieces) for name, tok in (("old", old), ("new", new))}
    results = {"heldout_bytes": sum(len(piece.encode()) for piece in pieces), "tokens": tokens}
    results["tokens"]["ratio"] = tokens["new"] / tokens["old"]
    results["bits_per_byte"] = {name: bits_per_byte(m, tok, pieces, length) for name, (tok, m) in models.items()}
    if STEPS.value:
        # Training gives up its model's arrays, which the three share: each trains a copy.
        results[f"bits_per_byte_after_{STEPS.value}_steps"] = {
            name: bits_per_byte(trained(jax.tree.map(lambda x: x.copy(), m), tok), tok, pieces, length)
            for name, (tok, m) in models.items()
        }
    output.finish(results | {"seed": speaking.SEED.value})


if __name__ == "__main__":
    app.run(main)
