"""What recipes for pods share: their flags, the run that they make, and what is said when it cannot be made.

A recipe is a dataclass; flags change it. The run reads prepared text (`data.prepared`), each process the rows of its own
devices; killed, preempted or grown, the same command goes on from the last checkpoint with the same batches.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags
from jax.sharding import Mesh

from experiments import output
from llama4_jax import checkpoint
from llama4_jax import config as configs
from llama4_jax import tokenizer as tokenizers
from llama4_jax.checkpoint import meta, native
from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.data import PreparedConfig
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning, processes
from llama4_jax.data import prepared, tokens
from llama4_jax.data.preparation import read
from llama4_jax.model import Llama4, accounting, initialise
from llama4_jax.plan import job
from llama4_jax.plan.compiler import Answers
from llama4_jax.train import metrics, pretrain, rows, shards

logger = logging.getLogger("llama4_jax.pod")
PLACEMENTS = {each.name: each for each in (partitioning.TRAIN, partitioning.LONG)}
LOADERS = {"config.json": checkpoint.load_hf, meta.PARAMS: checkpoint.load_meta, native.MANIFEST: native.load_native}

DATA = flags.DEFINE_multi_string("data", [], "folder of experiments.prepare_text, or folder:share; several are mixed")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tiktoken-format file or tokenizer.json, or a folder that has one")
OUTPUT = flags.DEFINE_string(
    "output", None, "where the run lives: checkpoints and metrics; default: runs/ and its name"
)
LOAD = flags.DEFINE_string(
    "load", None, "checkpoint to start from: Hugging Face's, Meta's or ours; default: a fresh model"
)
MODEL = flags.DEFINE_enum("model", None, sorted(presets.PRESETS), "another preset than the recipe's")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.num_layers=8")
TRAIN = flags.DEFINE_multi_string("train", [], "training override, as save_every=100 or optimizer.learning_rate=1e-3")
STEPS = flags.DEFINE_integer("steps", None, "optimiser steps of the whole run", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", None, "rows of a step, over all devices", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "tokens of a row", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of weights and of the order of rows")
MESH = flags.DEFINE_string("mesh", None, "axes of the mesh and their sizes, as fsdp=8,expert=16; -1: whatever is left")
PLACEMENT = flags.DEFINE_enum("placement", "train", sorted(PLACEMENTS), "long: few rows, whose tokens devices share")
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice that --plan_only compiles for")
CLUSTER = flags.DEFINE_bool("cluster", False, "find the other processes as TPU pods, Slurm and Open MPI name them")
PLAN_ONLY = flags.DEFINE_bool(
    "plan_only", False, "compile the step for TPUs that are not here, say what it needs, and end"
)
ANSWERS = flags.DEFINE_string("answers", ".cache/plans", "folder of what the compiler said, as of experiments.plan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of pretraining; each field but `name` has a flag."""

    name: str
    model: str  # a preset
    topology: str  # TPU slice for which its figures were made
    mesh: str
    batch: int  # rows of a step, all microbatches together
    length: int  # tokens of a row
    train: TrainConfig

    def config(self) -> Llama4Config:
        """The model, as --set changes it."""
        return configs.apply(presets.PRESETS[self.model](), SET.value)


def run(recipe: Recipe) -> dict | None:
    """Plans or trains `recipe` as the flags change it; the final numbers, None in all processes but the first."""
    output.quiet_libraries()
    recipe = asked(recipe)
    if PLAN_ONLY.value:
        return plan(recipe)
    with processes.joined(os.environ, cluster=CLUSTER.value):
        return train(recipe)


def asked(recipe: Recipe) -> Recipe:
    """`recipe` with what the flags say."""
    given = {"model": MODEL, "topology": TOPOLOGY, "mesh": MESH, "batch": BATCH, "length": LENGTH}
    changes = {name: flag.value for name, flag in given.items() if flag.value is not None}
    settings = dataclasses.replace(recipe.train, seed=SEED.value, steps=STEPS.value or recipe.train.steps)
    return dataclasses.replace(recipe, **changes, train=configs.apply(settings, TRAIN.value))


def plan(recipe: Recipe) -> dict:
    """What a step of the very run needs and costs, by the TPU's own compiler; times are estimates, not measured."""
    jax.config.update("jax_platforms", "cpu")  # the compiler is a library; no TPU is looked for
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    placement, settings = PLACEMENTS[PLACEMENT.value], recipe.train
    shape = {"topology": recipe.topology, "batch": recipe.batch, "length": recipe.length}
    question = job.Job(config=recipe.config(), mode="train", training=settings, **shape)
    mesh = device_mesh(recipe, placement, question.devices)
    choice = job.Choice.of(mesh, placement, settings)
    parameters = accounting.parameters(question.config)
    results = {"model": recipe.model} | shape | {"devices": len(question.devices), "flags": " ".join(choice.flags())}
    results |= {"parameters": parameters.total, "active_parameters": parameters.active}
    return results | question.outcome(choice, Answers(folder=pathlib.Path(ANSWERS.value)))


def train(recipe: Recipe) -> dict | None:
    """Trains, or resumes what lies in --output."""
    (folders, weights), tokenizer, placement = data_folders(), load_tokenizer(), PLACEMENTS[PLACEMENT.value]
    mesh = device_mesh(recipe, placement, jax.devices())
    shape = {"rows": recipe.batch // recipe.train.accumulation, "sequence_length": recipe.length}
    data = PreparedConfig(folders=folders, weights=weights, seed=SEED.value, **shape)
    own = rows.own(data.rows, data.sequence_length, mesh, placement)
    logger.info("process %d makes %d of %d rows", jax.process_index(), len(own), data.rows)
    model = load(tokenizer, mesh, placement) if LOAD.value else fresh(recipe, tokenizer, mesh, placement)
    tokenise(data, tokenizer)
    folder = pathlib.Path(OUTPUT.value or f"runs/{recipe.name}")
    batches = prepared.make(data, tokenizer, own=own)
    parameters = accounting.parameters(model.config)
    records = {"data_config": configs.to_dict(data)}
    pretrain.run(model, batches, recipe.train, folder=folder, records=records, mesh=mesh, placement=placement)
    batches.close()
    if not processes.leading():
        return None
    last = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" in line][-1]
    results = {"parameters": parameters.total, "active_parameters": parameters.active, "steps": recipe.train.steps}
    return results | {name: last[name] for name in ("loss", "tokens", "tokens_per_second", "seconds")}


def data_folders() -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What --data names, and the share of each; raises ValueError for a folder that is not prepared."""
    if not DATA.value:
        raise ValueError(
            "wanted --data=FOLDER, prepared by `python -m experiments.prepare_text --folder=FOLDER`; got none"
        )
    folders, weights = zip(*map(share, DATA.value))
    for folder in folders:
        read.manifest(folder)
    return folders, weights


def share(text: str) -> tuple[str, float]:
    """Folder and share of "FOLDER:0.7", or of "FOLDER", whose share is 1."""
    folder, colon, number = text.rpartition(":")
    try:
        return (folder, float(number)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def load_tokenizer() -> tokenizers.Tokenizer:
    """That which --tokenizer names."""
    if not TOKENIZER.value:
        raise ValueError("wanted --tokenizer=FILE, in tiktoken's format or a tokenizer.json; got none")
    path = pathlib.Path(TOKENIZER.value)
    inside = [path / "tokenizer.model", path / "tokenizer.json"]
    return tokenizers.load(next(filter(pathlib.Path.is_file, inside), path))


def device_mesh(recipe: Recipe, placement: partitioning.Placement, devices: Sequence[jax.Device]) -> Mesh:
    """`devices` as --mesh says; raises ValueError, with a mesh or a batch that works, where it cannot be."""
    try:
        mesh = partitioning.make_mesh(shards.parse(recipe.mesh), devices)
    except ValueError as error:
        expert = math.gcd(len(devices), recipe.config().text.moe.num_experts)
        works = f"fsdp={len(devices) // expert},expert={expert}"
        raise ValueError(f"{error}; --mesh={works} works, and --plan_only says what fits") from None
    count, ways = recipe.train.accumulation, partitioning.ways("batch", placement, mesh)
    if recipe.batch % (count * ways):
        multiple = count * ways
        raise ValueError(
            f"batch={recipe.batch} does not cut into accumulation={count} x {ways} parts, over which --mesh={recipe.mesh} "
            f"divides rows; use a multiple of {multiple}, as --batch={max(round(recipe.batch / multiple), 1) * multiple}"
        )
    return mesh


def fresh(recipe: Recipe, tokenizer: tokenizers.Tokenizer, mesh: Mesh, placement: partitioning.Placement) -> Llama4:
    """A model with random weights that knows the tokenizer's special ids."""
    config = recipe.config()
    check_vocabulary(config, tokenizer)
    special = tokenizer.special
    ids = {"bos_token": tokenizer.bos, "stop_tokens": tuple(tokenizer.stop)}
    if config.vision:
        ids |= {"patch_token": special["patch"]}
        ids |= {"image_start_token": special["image_start"], "image_end_token": special["image_end"]}
    return initialise(dataclasses.replace(config, **ids), seed=SEED.value, mesh=mesh, placement=placement)


def load(tokenizer: tokenizers.Tokenizer, mesh: Mesh, placement: partitioning.Placement) -> Llama4:
    """The checkpoint that --load names, straight into its shards, as float32 master weights."""
    folder = pathlib.Path(LOAD.value)
    loader = next((loader for mark, loader in LOADERS.items() if (folder / mark).is_file()), None)
    if loader is None or SET.value or MODEL.value:
        raise ValueError(
            f"--load={folder}: wanted a folder with one of {', '.join(LOADERS)}, and neither --set nor --model beside it, for "
            "its model is what it is; a run goes on by --output"
        )
    model = loader(folder, dtype="float32", mesh=mesh, placement=placement)
    check_vocabulary(model.config, tokenizer)
    if model.config.patch_token not in (None, tokenizer.special["patch"]):
        raise ValueError(
            f"the checkpoint's placeholder of pictures is token {model.config.patch_token}, the tokenizer's "
            f"{tokenizer.special['patch']}; give the tokenizer that the checkpoint was trained with"
        )
    if model.config.vision:
        logger.warning(
            "text alone gives the vision tower of %s no gradient, and weight decay shrinks it; keep it with "
            "--train optimizer.weight_decay=0",
            folder,
        )
    return model


def check_vocabulary(config: Llama4Config, tokenizer: tokenizers.Tokenizer) -> None:
    if tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model rows for {config.text.vocab_size}; give a smaller "
            f"tokenizer, or a fresh model --set text.vocab_size={tokenizer.vocab_size}"
        )


def tokenise(data: PreparedConfig, tokenizer: tokenizers.Tokenizer) -> None:
    """Each process its share of what no run has tokenised yet; all fail if one does."""
    error = None
    processes.wait_for_all()  # connected now: one that is done early would give up on the others
    try:
        for folder in data.folders:
            tokens.write(folder, tokenizer, index=jax.process_index(), count=jax.process_count())
    except Exception as raised:
        error = raised
    processes.fail_together(error)
