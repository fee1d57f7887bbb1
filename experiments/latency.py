"""How much faster do fewer bits decode, and for how many rows at once: Scout and Maverick, by batch, context and chip.

Claim:     at batch 1 int4 for routed experts alone is worth at most 1.38x on Scout, and for all weights 3.88x; each gain dies
           at some batch, where keys and values, or products, take the time: the table says at which.
Command:   python -m experiments.latency --json=latency.json --plot=docs/latency.png
           python -m experiments.latency --models=scout --chips=v5e --contexts=4096 --batches=1,16,256
           python -m experiments.latency --measure --preset=nano --batches=1,4 --contexts=64 --new=32
Hardware:  none for the table, which is an ESTIMATE, NOT MEASURED (`plan/latency.py` says of what); --measure decodes on
           whatever JAX finds, with a random model of a preset in bfloat16.
Wall time: about a minute for the table, which compiles nothing; for nano on a CPU --measure takes two minutes.
Expected:  docs/low_bit.md.

A cell of the table is the gain over bfloat16 at the first batch and at the last, and the batches from which on it stays below
1.5x and below 1.1x; "-" where it does so at none of --batches.
"""

from __future__ import annotations

import io
import pathlib
import statistics
import time

import jax
import matplotlib
import numpy as np
from absl import app, flags
from PIL import Image
from tqdm import tqdm

from experiments import output
from llama4_jax import config as configs
from llama4_jax import infer
from llama4_jax.config import presets, quant
from llama4_jax.core import partitioning
from llama4_jax.model import initialise
from llama4_jax.plan import latency, topology
from llama4_jax.plan.latency import BASELINE, Asked
from llama4_jax.plan.weights import Kept
from llama4_jax.quant import ptq
from llama4_jax.train import shards

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt

MODELS = flags.DEFINE_list("models", "scout,maverick", "presets of the table")
CHIPS = flags.DEFINE_list("chips", ",".join(topology.DEVICES), "kinds of chips")
BATCHES = flags.DEFINE_list("batches", "1,2,4,8,16,32,64,128,256", "rows at once, ascending")
CONTEXTS = flags.DEFINE_list("contexts", "4096,32768,131072,524288", "cached tokens of a row; with --measure, prompts")
RECIPES = flags.DEFINE_list("recipes", "int8,int4_experts,int4_all,w4a8", "formats of weights, besides bfloat16")
CACHES = flags.DEFINE_list("caches", "bfloat16,int8", "dtypes of the cache")
GROUP = flags.DEFINE_integer("group", 128, "weights of int4 that share a scale")
PLOT = flags.DEFINE_string("plot", None, "a picture of --plot_chip")
PLOT_CHIP = flags.DEFINE_string("plot_chip", "v5e", "which chip it shows")
MEASURE = flags.DEFINE_boolean("measure", False, "time decoding here, instead of the table")
PRESET = flags.DEFINE_enum("preset", "nano", sorted(presets.PRESETS), "--measure: the model, with random weights")
SET = flags.DEFINE_multi_string("set", [], "--measure: change the preset, a.b=c")
MESH = flags.DEFINE_string("mesh", None, "--measure: sizes of mesh axes, as tensor=8; by default one device")
NEW = flags.DEFINE_integer("new", 64, "--measure: tokens that are timed", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "--measure: medians of so many, formats taking turns", lower_bound=1)

LINES = (1.5, 1.1)
WHOLE_CHANNELS = ("int8", "fp8_mixed")  # recipes with a scale an output, where --group is not asked


def formats() -> tuple[Kept, ...]:
    """All but plain bfloat16."""
    makers = {name: quant.PRESETS[name] for name in RECIPES.value}
    recipes = [make() if name in WHOLE_CHANNELS else make(GROUP.value) for name, make in makers.items()]
    forms = [Kept(recipe=recipe, cache=cache) for cache in CACHES.value for recipe in (None, *recipes)]
    return tuple(form for form in forms if form != BASELINE)


def numbers(flag) -> list[int]:
    return [int(number) for number in flag.value]


def estimated(model: str, chip: str, context: int) -> dict:
    """Of each batch and format: milliseconds a token, gains, and where these die. Estimates."""
    config = presets.PRESETS[model]()
    asked = (Asked(config=config, chip=chip, batch=batch, context=context) for batch in numbers(BATCHES))
    found = {each.batch: latency.answer(each, formats()) for each in asked}
    points = {
        batch: {
            "chips": one.chips,
            "milliseconds": {name: 1e3 * value for name, value in one.seconds.items()},
            "gib_a_device": dict(one.memory),
            "mesh": dict(one.mesh),
        }
        for batch, one in found.items()
    }
    gains = {form.name: {batch: one.gain(form.name) for batch, one in found.items()} for form in formats()}
    dead = {f"below_{line}x_from": {n: latency.dies(each, line) for n, each in gains.items()} for line in LINES}
    return {"batch": points, "gain": gains} | dead


def cell(found: dict, name: str) -> str:
    gains = list(found["gain"][name].values())
    dead = (found[f"below_{line}x_from"][name] for line in LINES)
    return f"{gains[0]:.2f}..{gains[-1]:.2f} " + "/".join(str(batch or "-") for batch in dead)


def show(model: str, chip: str, found: dict[int, dict]) -> None:
    """A block of the table: a row for each format, a column for each context."""
    print(f"\n{model} on {chip}: gain at the first and last batch, and batches from which it is below 1.5x/1.1x")
    print(f"{'estimate, not measured':<26}" + "".join(f"{f'{context:,} tokens':>24}" for context in found))
    ends = numbers(BATCHES)[0], numbers(BATCHES)[-1]
    for label, pick in (("chips", lambda at: at["chips"]), ("bf16, ms", lambda at: at["milliseconds"][BASELINE.name])):
        pairs = ([pick(one["batch"][batch]) for batch in ends] for one in found.values())
        print(f"{label:<26}" + "".join(f"{f'{low:.4g}..{high:.4g}':>24}" for low, high in pairs))
    for form in formats():
        print(f"{form.name:<26}" + "".join(f"{cell(one, form.name):>24}" for one in found.values()))


def draw(path: pathlib.Path, tables: dict[str, dict[int, dict]]) -> None:
    """Gains over batches on one chip: a row for each model, a column for each context."""
    contexts, size = numbers(CONTEXTS), (3 * len(CONTEXTS.value), 2.6 * len(tables) + 0.6)
    figure, grid = plt.subplots(len(tables), len(contexts), figsize=size, squeeze=False, sharex=True, sharey=True)
    for (model, by_context), axes in zip(tables.items(), grid):
        axes[0].set_ylabel("times bf16", fontsize=9)
        for context, panel in zip(contexts, axes):
            draw_gains(panel, by_context[context])
            panel.set_title(f"{model}, {context // 1024}k tokens", fontsize=9)
    for panel in grid[-1]:
        panel.set_xlabel("rows at once", fontsize=9)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8, frameon=False)
    title = f"Gain in time of a token on as many {PLOT_CHIP.value} as bf16 takes. Estimate, not measured. Dots: below 1.5x from here on"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def draw_gains(panel, found: dict) -> None:
    colours = dict(zip(["bf16", *RECIPES.value], plt.get_cmap("tab10").colors))
    for form in formats():
        gains, colour = found["gain"][form.name], colours[form.weights]
        style = "--" if form.cache == "int8" else "-"
        panel.plot(list(gains), list(gains.values()), style, lw=1.3, label=form.name, color=colour)
        dead = found["below_1.5x_from"][form.name]
        if dead:
            panel.plot(dead, gains[dead], "o", ms=4, color=colour)
    for line, width in zip(LINES, (0.9, 0.5)):
        panel.axhline(line, color="black", lw=width)
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3)


def measured() -> dict:
    """Milliseconds of a token of each row on this machine, by batch, context and format."""
    config = configs.apply(presets.PRESETS[PRESET.value](), SET.value)
    found = {"device": jax.devices()[0].device_kind, "preset": PRESET.value}
    if MESH.value is None:
        return found | timed(config, None)
    mesh = partitioning.make_mesh(shards.parse(MESH.value))
    with partitioning.use(mesh, partitioning.SERVE):
        return found | timed(config, mesh)


def timed(config, mesh) -> dict:
    plain = initialise(config, dtype="bfloat16", mesh=mesh, placement=partitioning.SERVE)
    models = {BASELINE.weights: infer.prepare(plain)}
    for form in formats():
        if form.weights not in models:
            models[form.weights] = infer.prepare(ptq.quantise(plain, form.recipe))
    found, forms = {}, (BASELINE, *formats())
    for batch in numbers(BATCHES):
        for context in numbers(CONTEXTS):
            prompts = np.random.default_rng(0).integers(1, config.text.vocab_size, (batch, context)).tolist()
            runs = {form.name: [] for form in forms}
            for _ in range(1 + REPEATS.value):  # the first compiles
                for form in forms:
                    runs[form.name].append(seconds(models[form.weights], prompts, form.cache))
            medians = {name: 1e3 * statistics.median(each[1:]) for name, each in runs.items()}
            gains = {name: medians[BASELINE.name] / value for name, value in medians.items()}
            found[f"{batch} rows of {context}"] = {"milliseconds_measured": medians, "gain_measured": gains}
    return found


def seconds(model, prompts, cache: str) -> float:
    """Of a token of each row: of --new more of them, beyond what the prompt and the first take."""

    def run(new: int) -> float:
        start = time.perf_counter()
        infer.generate(model, prompts, max_new_tokens=new, cache_dtype=cache)
        return time.perf_counter() - start

    return (run(1 + NEW.value) - run(1)) / NEW.value


def main(_) -> None:
    output.quiet_libraries()
    if MEASURE.value:
        return output.finish(measured())
    tables = {}
    for chip in tqdm(CHIPS.value, "chips"):
        for model in MODELS.value:
            found = {context: estimated(model, chip, context) for context in numbers(CONTEXTS)}
            tables.setdefault(chip, {})[model] = found
    for chip, models in tables.items():
        for model, found in models.items():
            show(model, chip, found)
    if PLOT.value:
        draw(pathlib.Path(PLOT.value), tables[PLOT_CHIP.value])
    output.finish({"measured": False}, unprinted={"estimate_not_measured": tables})


if __name__ == "__main__":
    app.run(main)
