"""Train a small natively multimodal Llama 4 on pictures and text until it names what it sees; then show that it does.

Claim:     one decoder, fed pixels and text in one stream, learns to name held-out renderings of 320 emoji in four
           languages, and looks at them to do so: with the pictures shuffled it fails.
Command:   python -m experiments.pretrain_nano                    (the main job of `make demo`)
Hardware:  2 CPU cores; at most 10 minutes, set-up apart.
Expected:  exact-name accuracy on held-out renderings >= 75 %; at most a tenth of that with shuffled pictures.

Killed or interrupted, the same command goes on where it was. Every size is a flag: --set for the model, --data for the
data, --train for the training. --mesh spreads the model over several devices, and `launch/` starts several processes:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m experiments.pretrain_nano --mesh=fsdp=2,expert=2
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m experiments.pretrain_nano --mesh=context=4 --placement=long
    python -m launch.local --processes=4 -- python -m experiments.pretrain_nano --mesh=fsdp=2,expert=2
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from experiments import output
from llama4_jax import config as configs
from llama4_jax import tokenizer as tokenizers
from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.data import DataConfig
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names, partitioning, processes
from llama4_jax.data import emoji, heldout, loader
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.eval import naming, report
from llama4_jax.model import Llama4, initialise
from llama4_jax.train import loop, metrics, pretrain, shards

PLACEMENTS = {each.name: each for each in (partitioning.TRAIN, partitioning.LONG)}

FOLDER = flags.DEFINE_string("folder", "runs/nano", "where the run lives: tokenizer, checkpoints, metrics, report")
SEED = flags.DEFINE_integer("seed", 0, "of weights, data order and renderings")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.num_layers=8")
DATA = flags.DEFINE_multi_string("data", [], "data override, as num_emoji=500")
TRAIN = flags.DEFINE_multi_string("train", [], "training override, as steps=300 or optimizer.learning_rate=1e-3")
ON_NAN = flags.DEFINE_enum("on_nan", "stop", ["stop", "rollback"], "what to do when the loss is not finite")
MESH = flags.DEFINE_string("mesh", None, "axes of the mesh and their sizes, as fsdp=2,expert=2; -1: whatever is left")
PLACEMENT = flags.DEFINE_enum("placement", "train", sorted(PLACEMENTS), "long: few rows, whose tokens devices share")
CLUSTER = flags.DEFINE_bool("cluster", False, "find the other processes as TPU pods, Slurm and Open MPI name them")
VOCABULARY = flags.DEFINE_integer("vocab_size", 4096, "tokens of the tokenizer, special ones included")


def data_config() -> DataConfig:
    return configs.apply(DataConfig(seed=SEED.value), DATA.value)


def train_config() -> TrainConfig:
    optimizer = OptimizerConfig(name="muon", learning_rate=6e-3, warmup_steps=50, final_fraction=0.05)
    config = TrainConfig(steps=1150, optimizer=optimizer, balance_loss=0.01, save_every=250, keep=2, seed=SEED.value)
    return configs.apply(dataclasses.replace(config, on_nan=ON_NAN.value), TRAIN.value)


def model_config(data: DataConfig, tokenizer: tokenizers.Tokenizer) -> Llama4Config:
    """The nano preset with this tokenizer's ids, after the overrides of --set."""
    config = configs.apply(pretrain.for_tokenizer(presets.nano(), tokenizer), SET.value)
    wanted = (config.vision.image_size, config.vision.tokens_per_tile)
    if wanted != (data.image_size, data.tokens_per_tile):
        raise ValueError(
            f"the model takes pictures of {wanted[0]} pixels as {wanted[1]} tokens, the data makes {data.image_size} "
            f"and {data.tokens_per_tile}; pass --data image_size={wanted[0]} --data tokens_per_tile={wanted[1]}"
        )
    return config


def device_mesh() -> Mesh | None:
    """As --mesh says; without it one device, and where there are several processes all their devices."""
    if MESH.value:
        return partitioning.make_mesh(shards.parse(MESH.value))
    return partitioning.make_mesh({"fsdp": -1}) if jax.process_count() > 1 else None


def heldout_accuracy(structure: names.Structure, grammar: PictureGrammar, questions: list) -> loop.Callback:
    """Asks a few held-out questions now and then, for the curve."""

    def run(params, step: int) -> dict[str, float] | None:
        model = gathered(structure, params)
        return {"heldout_accuracy": naming.accuracy(naming.ask(model, grammar, questions))["all"]} if model else None

    return run


def gathered(structure: names.Structure, params: dict[str, jax.Array]) -> Llama4 | None:
    """The model on one device of process 0, which answers questions; None in the others."""
    params = processes.whole(params)
    return structure.merge(jax.tree.map(jnp.asarray, params)) if processes.leading() else None


def evaluate(model: Llama4, data: DataConfig, tokenizer, grammar: PictureGrammar) -> tuple[dict, list[naming.Answer]]:
    """All that is claimed of the trained model, and its answers to every held-out question."""
    questions = list(heldout.questions(data, tokenizer))
    answers = naming.ask(model, grammar, questions)
    accuracy = naming.accuracy(answers)
    blind = naming.accuracy(naming.ask(model, grammar, questions, naming.shuffled(questions, SEED.value)))
    untrained = list(heldout.questions(data, tokenizer, heldout.Pairs.UNTRAINED))
    unseen = naming.accuracy(naming.ask(model, grammar, untrained)) if untrained else {"all": None}
    results = {
        "accuracy": accuracy["all"],
        "accuracy_by_language": {code: accuracy[code] for code in data.languages},
        "accuracy_shuffled_images": blind["all"],
        "accuracy_untrained_pairs": unseen["all"],
        "questions": len(questions),
        "untrained_pairs": len(untrained),
        "emoji": data.num_emoji,
    }
    return results, answers


def write_report(folder: pathlib.Path, results: dict, answers: list[naming.Answer]) -> pathlib.Path:
    records = metrics.read(folder / "metrics.jsonl")
    chosen = np.random.default_rng(SEED.value).choice(len(answers), size=min(36, len(answers)), replace=False)
    percent = lambda share: "not asked" if share is None else f"{100 * share:.1f} %"  # noqa: E731
    table = [("held-out questions", "exact names")]
    table += [(emoji.LANGUAGES[code], percent(share)) for code, share in results["accuracy_by_language"].items()]
    table += [
        ("all languages", percent(results["accuracy"])),
        ("all languages, pictures shuffled", percent(results["accuracy_shuffled_images"])),
        ("(emoji, language) pairs never trained on", percent(results["accuracy_untrained_pairs"])),
    ]
    figures = {
        "names": report.answer_sheet([answers[i] for i in chosen]),
        "curves": report.loss_curves(records),
        "expert_load": report.expert_load(records),
    }
    caption = f"{results['questions']} new renderings of {results['emoji']} emoji, never seen in training"
    return report.write(folder, "A nano Llama 4 names pictures", figures, {caption: table}, [emoji.ATTRIBUTION])


def main(_) -> None:
    output.quiet_libraries()
    with processes.joined(os.environ, cluster=CLUSTER.value):
        run()


def run() -> None:
    start = time.perf_counter()
    folder, data, train, mesh = pathlib.Path(FOLDER.value), data_config(), train_config(), device_mesh()
    with processes.leader_first():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizers.train(loader.tokenizer_texts(data), VOCABULARY.value, folder / "tokenizer.model")
    config = model_config(data, tokenizer)
    if processes.leading():
        (folder / "config.json").write_text(json.dumps(configs.to_dict(config), indent=1))
    model = initialise(config, seed=SEED.value, mesh=mesh)
    structure, _ = names.split(model)
    grammar = PictureGrammar(tokenizer, data.tokens_per_tile)
    few = list(heldout.questions(data, tokenizer))[::5]
    ask = loop.Callback(max(train.steps // 5, 1), heldout_accuracy(structure, grammar, few))
    batches = loader.make(data, tokenizer, drawn=shards.own_pictures(data.images_per_batch, mesh))
    where = {"mesh": mesh, "placement": PLACEMENTS[PLACEMENT.value]}
    model = pretrain.run(model, batches, train, folder=folder, callbacks=[ask], **where)
    model = gathered(*names.split(model))
    if model is None:
        return
    results, answers = evaluate(model, data, tokenizer, grammar)
    page = write_report(folder, results, answers)
    results |= {"seed": SEED.value, "steps": train.steps, "parameters": sum(x.size for x in jax.tree.leaves(model))}
    results |= {"minutes": (time.perf_counter() - start) / 60}
    output.finish(results, folder / "results.json")
    print(f"report: {page}")


if __name__ == "__main__":
    app.run(main)
