"""What a step of training, prefill, decoding or conversion needs and costs on TPUs that are not here, by their own compiler.

Claim:     a layout fits a pod, or by how much it does not, before anyone rents one; memory, products and bytes are those
           of the real program, times are estimates and not measured.
Command:   python -m experiments.plan --model=scout --mode=train --topology=v5p:4x4x8 --mesh=fsdp=8,expert=16 \
               --batch=256 --length=8192 --remat=block --json=plan.json
           python -m experiments.plan --model=scout --topology=v5p:4x4x4 --mesh=fsdp=4,expert=16 --placement=long \
               --batch=4 --length=524288
           python -m experiments.plan --model=scout --mode=decode --topology=v5e:4x4 --mesh=tensor=8,expert=2 --batch=16
           python -m experiments.plan --model=scout --mode=conversion --topology=v5p:4x4x8 --mesh=fsdp=8,expert=16
           python -m experiments.plan --model=scout --mode=decode --topology=v5e:2x4 --mesh=tensor=8 --batch=8 --length=32768 \
               --quant=int4_all --cache=int8
           python -m experiments.plan --model=maverick --topology=v5p:4x8x8 --batch=256 --search --search_limit=6
           python -m experiments.plan --mesh=fsdp=8,expert=16 --search --within=peak=37,wire=200,products=1.845
Hardware:  a CPU with the package libtpu (the extra [plan]); no TPU.
Wall time: seconds for small models, minutes for Scout and Maverick, whatever their depth; with --search for each layout.
Expected:  docs/sharding.md and docs/scaling.md.

`--set` changes the model, `--train` the training, as in pretrain_nano. `--search` compiles what is asked and the most
promising other meshes, placements, policies of remat, places to keep things in and microbatches, and ranks them; `--within`
bounds what they may take. Attention is counted by formula: over the keys that the mask leaves in one document a row, since
its loops depend on data. `--mode=conversion` makes parameters of the tensors of a released checkpoint, `--mode=qat` trains with
rounding to few bits (`--train qat.recipe=...`, int4_all by default).
`--closed_form` gives the formulas that a search leaves layouts out by, and compiles nothing.
Answers of the compiler are kept in --answers, so that no program is compiled twice; --fresh compiles it again.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is a library; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax import config as configs
from llama4_jax.config import presets, quant
from llama4_jax.config.train import REMAT, QatConfig, TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.model import accounting
from llama4_jax.plan import estimate, search, topology
from llama4_jax.plan.compiler import Answers
from llama4_jax.plan.job import MODES, PLACEMENTS, Choice, Job
from llama4_jax.plan.weights import PLAIN, Kept
from llama4_jax.train import shards

MODEL = flags.DEFINE_enum("model", "scout", sorted(presets.PRESETS), "which preset")
MODE = flags.DEFINE_enum("mode", "train", [*MODES, "qat"], "which step; qat: training that rounds to few bits")
TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x8", "kind of TPU and shape of the slice")
MESH = flags.DEFINE_string("mesh", "fsdp=-1", "sizes of mesh axes; -1 takes what is left")
BATCH = flags.DEFINE_integer("batch", 256, "rows, over all devices", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 8192, "tokens of a row; in decoding, slots of the cache", lower_bound=1)
REMATERIALISE = flags.DEFINE_enum("remat", "block", sorted(REMAT), "what the backward pass finds")
PLACEMENT = flags.DEFINE_enum("placement", None, sorted(PLACEMENTS), "how arrays lie; by default train, or serve")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.num_layers=8")
TRAIN = flags.DEFINE_multi_string("train", [], "training override, as accumulation=2")
SEARCH = flags.DEFINE_boolean("search", False, "compile other layouts too, and rank them")
SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 4, "how many others", lower_bound=1)
WITHIN = flags.DEFINE_list(
    "within", [], "what a search may take: peak and wire in GiB, products in PFLOP, as peak=37,wire=200"
)
QUANT = flags.DEFINE_enum("quant", None, sorted(quant.PRESETS), "serving: weights in few bits, by this recipe")
GROUP = flags.DEFINE_integer("group", None, "weights that share a scale; by default the recipe's", lower_bound=1)
CACHE = flags.DEFINE_enum("cache", "bfloat16", ["bfloat16", "int8"], "serving: dtype of keys and values")
ANSWERS = flags.DEFINE_string("answers", ".cache/plans", "folder of the compiler's answers")
CLOSED_FORM = flags.DEFINE_boolean("closed_form", False, "compile nothing: a rough answer, at once")
FRESH = flags.DEFINE_boolean("fresh", False, "compile even what was compiled before")


def asked() -> tuple[Job, Choice]:
    """What the flags ask for."""
    topology.device(TOPOLOGY.value)
    rounding = QatConfig(recipe="int4_all") if MODE.value == "qat" else QatConfig()
    training = {"steps": 1000, "compute_dtype": "bfloat16", "logits_limit": 2**28, "qat": rounding}
    training = configs.apply(TrainConfig(remat=REMATERIALISE.value, **training), TRAIN.value)
    mode = "train" if MODE.value == "qat" else MODE.value
    job = Job(
        config=configs.apply(presets.PRESETS[MODEL.value](), SET.value),
        mode=mode,
        topology=TOPOLOGY.value,
        batch=BATCH.value,
        length=LENGTH.value,
        training=training,
        kept=kept(),
    )
    placement = PLACEMENTS[PLACEMENT.value or ("train" if mode in ("train", "conversion") else "serve")]
    mesh = partitioning.make_mesh(shards.parse(MESH.value), job.devices)
    return job, Choice.of(mesh, placement, training)


def kept() -> Kept:
    """How a model that serves is kept."""
    if MODE.value not in ("prefill", "decode") and (QUANT.value or CACHE.value != "bfloat16"):
        raise app.UsageError(f"--quant and --cache are of a model that serves; --mode={MODE.value} knows neither")
    group = () if GROUP.value is None else (GROUP.value,)
    return Kept(recipe=quant.PRESETS[QUANT.value](*group) if QUANT.value else None, cache=CACHE.value)


def advice(job: Job, choice: Choice, found: list[search.Tried]) -> str:
    """For what does not fit, or takes more than --within: by how much, and the nearest change that does, compiled or not."""
    first, limits = found[0], within()
    if first.within(limits):
        return "fits"
    over = f"does not fit by {first.outcome['over_gib']:.2f} GiB a device"
    over = ("fits, but takes more than --within" if first.fits else over) + "; nearest change that does: "
    if SEARCH.value:
        fitting = search.nearest_fit(found, limits)
        return over + (changes(choice, fitting.choice) + " (compiled)" if fitting else f"none of {len(found)} compiled")
    likely = search.likely(job, first, limits) if job.mode != "conversion" else None
    return over + (changes(choice, likely) if likely else "more devices") + " (by closed form; --search compiles it)"


def within() -> search.Limits:
    """What --within says; raises ValueError for what has no limit."""
    named = dict(part.split("=", 1) for part in WITHIN.value)
    unknown = sorted(set(named) - set(search.Limits._fields))
    if unknown:
        raise ValueError(f"--within={unknown[0]}: use one of {', '.join(search.Limits._fields)}, each with a number")
    return search.Limits(**{name: float(number) for name, number in named.items()})


def changes(choice: Choice, other: Choice) -> str:
    return " ".join(new for old, new in zip(choice.flags(), other.flags()) if old != new)


def show(found: list[search.Tried]) -> None:
    """The table of a search, best first; numbers are of a device, times estimates."""
    mesh = max(len(tried.choice.flags()[0]) for tried in found) - len("--mesh=")
    head = f"{'mesh':<{mesh}}  {'placement':<9}  {'remat':<11}  {'parts':>5}  {'kept in':<7}"
    print(f"\n{head}  {'GiB':>6}  {'expected':>8}  {'wire GiB':>8}  {'PFLOP':>7}  {'s, estimate':>11}  {'MFU':>5}")
    for tried in search.ranked(found, within()):
        names = [flag.split("=", 1)[1] for flag in tried.choice.flags()]
        names[2:] = names[2:] if MODE.value in ("train", "qat") else "---"  # serving has none of these
        row = f"{names[0]:<{mesh}}  {names[1]:<9}  {names[2]:<11}  {names[3]:>5}  {names[4]:<7}"
        print(f"{row}  {numbers(tried)}{'  <- asked' if tried is found[0] else ''}")
    print()


def numbers(tried: search.Tried) -> str:
    expected, outcome = f"{tried.expected.memory:8.1f}", tried.outcome
    if "memory_gib" not in outcome:
        reason = outcome.get("refused") or f"{outcome['over_gib']:.2f} GiB too much"
        return f"{'':6}  {expected}  {reason}"
    work, times = outcome["work_of_a_device"], outcome["estimate_not_measured"]
    products = work["matrix_pflop"] + outcome["attention_pflop_by_formula"]
    line = f"{outcome['memory_gib']['peak']:6.1f}  {expected}  {work['wire_gib']:8.1f}  {products:7.3f}"
    line += f"  {times['seconds_step']:11.4f}  {times['mfu']:5.1%}"
    return line if tried.fits else f"{line}  {outcome['over_gib']:.2f} GiB too much"


def short(tried: search.Tried) -> dict:
    """A row of the table for --json."""
    row = {"flags": " ".join(tried.choice.flags()), "fits": tried.fits}
    if "memory_gib" not in tried.outcome:
        return row | {name: tried.outcome[name] for name in ("refused", "over_gib") if name in tried.outcome}
    work, times = tried.outcome["work_of_a_device"], tried.outcome["estimate_not_measured"]
    row |= {"peak_gib": tried.outcome["memory_gib"]["peak"], "wire_gib": work["wire_gib"]}
    return row | {"seconds_step_estimate": times["seconds_step"]}


def tried(job: Job, choice: Choice) -> list[search.Tried]:
    """What was asked, compiled, and others with --search."""
    answers = Answers(
        folder=pathlib.Path(ANSWERS.value), fresh=FRESH.value, flags=os.environ.get("LIBTPU_INIT_ARGS", "")
    )
    trials = search.search(job, choice, SEARCH_LIMIT.value if SEARCH.value else 0, answers, within())
    return list(tqdm(trials, "compiling", SEARCH_LIMIT.value + 1, unit="layout", disable=not SEARCH.value))


def rough(job: Job, choice: Choice) -> dict:
    """A device's memory, work and seconds of a step by formula."""
    found = dataclasses.asdict(estimate.of(job, choice))
    taken = {"memory_gib": found.pop("memory")} | {name: found.pop(name) for name in ("wire_gib", "matrix_pflop")}
    return taken | {f"seconds_{name}": value for name, value in found.items()}


def main(_) -> None:
    output.quiet_libraries()
    job, choice = asked()
    if SEARCH.value and job.mode == "conversion":
        raise ValueError(
            "--search lays out steps; a conversion lies as the step that it is for: give that one's --mesh and --placement"
        )
    parameters = accounting.parameters(job.config)
    results = {name: flag.value for name, flag in (("model", MODEL), ("mode", MODE), ("topology", TOPOLOGY))}
    mesh = choice.flags()[0].removeprefix("--mesh=")
    results |= {"batch": job.batch, "length": job.length} if job.tokens else {}
    results |= {"mesh": mesh, "placement": choice.placement.name}
    varied = ("remat", "accumulation", "kept_in") if job.mode == "train" else ()
    results |= {name: getattr(choice, name) for name in varied}
    results |= {"qat": job.training.qat.recipe} if job.mode == "train" and job.training.qat.recipe else {}
    results |= {} if job.kept == PLAIN else {"kept": job.kept.name}
    results |= {"parameters": parameters.total, "active_parameters": parameters.active, "devices": job.size}
    results |= {"closed_form": rough(job, choice)}
    if CLOSED_FORM.value:
        return output.finish(results)
    found = tried(job, choice)
    results |= found[0].outcome | {"verdict": advice(job, choice, found)}
    if SEARCH.value:
        show(found)
        results |= {"search": {str(rank): short(each) for rank, each in enumerate(search.ranked(found, within()), 1)}}
    output.finish(results)


if __name__ == "__main__":
    app.run(main)
