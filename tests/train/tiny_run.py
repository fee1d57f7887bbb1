"""A whole training run small enough to be killed in tests: `python tiny_run.py FOLDER [--steps N] [--pace SECONDS]`.

Prints `step N` after each step, so that a test knows when to strike.
"""

import argparse
import dataclasses
import logging
import time

import numpy as np


class CountingLoader:
    """Endless batches of counting in steps of 1 to 3 modulo the vocabulary: two documents a row, then padding.

    Batch i is a function of (seed, i) alone. From batch `poison` on, weights are infinite for one batch.
    """

    def __init__(self, *, batch: int = 4, time: int = 24, vocab: int = 32, seed: int = 0, poison: int | None = None):
        self.shape, self.vocab, self.seed, self.poison = (batch, time), vocab, seed, poison
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        b, t = self.shape
        rng = np.random.default_rng((self.seed, self.index))
        first = t // 2
        segments = np.repeat([[1] * first + [2] * (t - first - 2) + [0] * 2], b, axis=0).astype(np.int32)
        positions = np.concatenate([np.arange(first), np.arange(t - first)])[None].repeat(b, axis=0).astype(np.int32)
        start, stride = rng.integers(0, self.vocab, (b, 3)), rng.integers(1, 4, (b, 3))
        count = lambda offset: (  # noqa: E731
            np.take_along_axis(start, segments, 1) + np.take_along_axis(stride, segments, 1) * (positions + offset)
        )
        weights = (segments > 0).astype(np.float32)
        if self.index == self.poison:
            weights[0, 0] = np.inf
        self.index += 1
        return {
            "tokens": (count(0) % self.vocab).astype(np.int32),
            "targets": (count(1) % self.vocab).astype(np.int32),
            "loss_weights": weights,
            "positions": positions,
            "segments": segments,
        }

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def small_config():
    """Two layers, both kinds of feed-forward, text only: compiles in a few seconds."""
    from llama4_jax.config import presets

    config = presets.tiny()
    attention = dataclasses.replace(config.text.attention, nope_interval=2)
    text = dataclasses.replace(config.text, vocab_size=32, num_layers=2, attention=attention)
    return dataclasses.replace(
        config, text=text, vision=None, patch_token=None, image_start_token=None, image_end_token=None
    )


def run_config(**changes):
    """The run of `main`; tests that train the same model share its compiled step."""
    from llama4_jax.config.train import OptimizerConfig, TrainConfig

    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    return TrainConfig(**{"steps": 24, "optimizer": optimizer, "log_every": 1, "save_every": 5} | changes)


def quick_model(config, seed: int = 0):
    """A model with weights drawn by numpy: compiling the real initialisation would take longer than the tests."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from llama4_jax.core import names
    from llama4_jax.model import Llama4

    rng = np.random.default_rng(seed)
    structure, shapes = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))

    def draw(name: str, shape) -> np.ndarray:
        if name.endswith(("scale", "bias")):
            return np.full(shape, float(name.endswith("scale")))
        return rng.normal(size=shape) / config.text.embed_dim**0.5

    return structure.merge({name: jnp.asarray(draw(name, s.shape), s.dtype) for name, s in shapes.items()})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pace", type=float, default=0.0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    from llama4_jax.train import pretrain
    from llama4_jax.train.loop import Callback

    def tell(params, step):
        print(f"step {step}", flush=True)
        time.sleep(arguments.pace)

    config = run_config(steps=arguments.steps)
    model = quick_model(small_config())
    pretrain.run(model, CountingLoader(), config, folder=arguments.folder, callbacks=[Callback(1, tell)])
    print("done", flush=True)


if __name__ == "__main__":
    main()
