"""How memory and a step's time grow over pods and lengths of rows: what the compiler said, beside the closed form.

Claim:     with tokens a step held fixed, a chip's memory does not grow with the length of a row, and a step's time grows by
           the global layers' attention alone; twice the chips take half of both.
Command:   python -m experiments.scaling                          (tables, and docs/scaling.png)
           python -m experiments.scaling --commands               (what compiles the cells that are not there yet)
           python -m experiments.scaling --plans=.cache/scaling   (takes what they wrote into docs/scaling.json)
Hardware:  a CPU; compiling wants the package libtpu (the extra [plan]) and takes minutes a cell, the rest seconds.
Expected:  docs/scaling.md.

About two million tokens a step everywhere, float32 weights and AdamW, bfloat16 compute. Memory is what the TPU compiler
allots; times are estimates, not measured: no TPU ran any of this.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import matplotlib
from absl import app, flags

from experiments import output
from llama4_jax.config import presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.plan import estimate, topology
from llama4_jax.plan.job import PLACEMENTS, Choice, Job
from llama4_jax.train import shards

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt

TABLE = flags.DEFINE_string("table", "docs/scaling.json", "what the compiler said, a row for each step")
PLANS = flags.DEFINE_string("plans", None, "folder of files that experiments.plan --json wrote, to add to the table")
PLOT = flags.DEFINE_string("plot", "docs/scaling.png", "the picture")
COMMANDS = flags.DEFINE_boolean("commands", False, "print what compiles the cells that the table lacks, and end")

PODS = {"v5p:4x4x8": "128 v5p", "v5p:4x8x8": "256 v5p", "v6e:16x16": "256 v6e"}
ROWS = {8192: 256, 262_144: 8, 524_288: 4}  # length -> rows of a step
_SCOUT_256 = ("fsdp=16,expert=16", "fsdp=8,expert=16,context=2", "fsdp=4,expert=16,context=4")
MESHES = {  # model, pod -> of each length
    ("scout", "v5p:4x4x8"): ("fsdp=8,expert=16", "fsdp=8,expert=16", "fsdp=4,expert=16,context=2"),
    ("scout", "v5p:4x8x8"): _SCOUT_256,
    ("scout", "v6e:16x16"): _SCOUT_256,
    ("maverick", "v5p:4x4x8"): ("fsdp=4,expert=32", "fsdp=4,expert=32", "fsdp=4,expert=32"),
    ("maverick", "v5p:4x8x8"): ("fsdp=8,expert=32", "fsdp=8,expert=32", "fsdp=4,expert=64"),
    ("maverick", "v6e:16x16"): ("fsdp=8,expert=32", "fsdp=2,expert=64,context=2", "fsdp=4,expert=64"),
}
KEPT_IN = {("maverick", "v6e:16x16"): "host"}  # what does not fit with everything on the device
MODELS = tuple(dict.fromkeys(model for model, _ in MESHES))
COLOURS = dict(zip(PODS, ("#3b5b92", "#4c9a6a", "#c8553d")))
ASIDE = dict(zip(PODS, (-7000, 0, 7000)))  # tokens: what would lie on one another lies beside


class Cell(NamedTuple):
    """A training step that the table is about; others, with another mesh or policy, may stand beside it."""

    model: str
    pod: str
    length: int

    @property
    def rows(self) -> int:
        return ROWS[self.length]

    @property
    def mesh(self) -> str:
        return MESHES[self.model, self.pod][list(ROWS).index(self.length)]

    @property
    def placement(self) -> str:
        return "train" if self.length == min(ROWS) else "long"

    @property
    def kept_in(self) -> str:
        """Where layers' inputs wait for the backward pass."""
        return KEPT_IN.get(self[:2], "device")

    @property
    def flags(self) -> str:
        """What experiments.plan is asked for it."""
        lies = f"--mesh={self.mesh} --placement={self.placement}"
        kept = "" if self.kept_in == "device" else f" --train kept_in={self.kept_in}"
        return f"--model={self.model} --topology={self.pod} {lies} --batch={self.rows} --length={self.length}{kept}"

    def expected(self) -> estimate.Estimate:
        """The closed form."""
        training = TrainConfig(steps=1000, compute_dtype="bfloat16", remat="block", logits_limit=2**28)
        job = {"config": presets.PRESETS[self.model](), "mode": "train", "topology": self.pod, "training": training}
        lies = {"mesh": tuple(shards.parse(self.mesh).items()), "placement": PLACEMENTS[self.placement]}
        return estimate.of(Job(**job, batch=self.rows, length=self.length), Choice(**lies, kept_in=self.kept_in))


CELLS = [Cell(model, pod, length) for model in MODELS for pod in PODS for length in ROWS]


def row(plan: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The flags of a compiled step, and what is kept of it."""
    names = ("model", "mode", "topology", "mesh", "placement", "batch", "length", "remat", "accumulation", "kept_in")
    flag = " ".join(f"--{name}={plan[name]}" for name in names if name in plan)
    kept = {name: plan[name] for name in ("fits", "over_gib", "compile_seconds")}
    if "memory_gib" in plan:  # the compiler did not refuse it
        work, times = plan["work_of_a_device"], plan["estimate_not_measured"]
        kept |= {"peak_gib": plan["memory_gib"]["peak"], "on_host_gib": plan["memory_gib"]["on_host"]}
        kept |= {name: work[name] for name in ("wire_gib", "matrix_pflop", "hbm_tb")}
        kept |= {name: value for name, value in times.items() if name.startswith("seconds_")}
    return flag, {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}


def wanted(cell: Cell) -> str:
    """Under which flags the table has a cell."""
    shared = {"remat": "block", "accumulation": 1, "kept_in": cell.kept_in, "mode": "train", "topology": cell.pod}
    plain = {"model": cell.model, "mesh": cell.mesh, "placement": cell.placement, "batch": cell.rows}
    return row(shared | plain | {"length": cell.length, "fits": None, "over_gib": None, "compile_seconds": None})[0]


def show(table: dict[str, Any], expected: dict[Cell, estimate.Estimate]) -> None:
    """Memory and time, as docs/scaling.md has them: compiled, and the closed form in brackets."""
    print("\nGiB a chip / seconds of a step, estimated; closed form in brackets\n")
    print("| | chips | " + " | ".join(f"{length:,}" for length in ROWS) + " |\n|---|---|" + "---|" * len(ROWS))
    for model in MODELS:
        for pod in PODS:
            cells = [text(table.get(wanted(cell)), expected[cell]) for cell in CELLS if cell[:2] == (model, pod)]
            waits = f", kept_in={KEPT_IN[model, pod]}" if (model, pod) in KEPT_IN else ""
            print(f"| {model.capitalize()} | {PODS[pod]}{waits} | " + " | ".join(cells) + " |")
    print()


def text(found: dict[str, Any] | None, closed: estimate.Estimate) -> str:
    formula = f"({closed.memory:.1f} / {closed.seconds[0]:.1f})"
    if found is None:
        return f"not compiled {formula}"
    if "peak_gib" not in found:
        return f"{found['over_gib']:.1f} GiB too much {formula}"
    bound = "at most " if found.get("on_host_gib") else ""  # see `plan.compiler`
    return f"{bound}{found['peak_gib']:.1f} / {found['seconds_step']:.1f} {formula}"


def draw(path: pathlib.Path, table: dict[str, Any], expected: dict[Cell, estimate.Estimate]) -> None:
    """Memory (above) and time (below) against length, a line for each pod by the closed form, dots where compiled."""
    figure, panels = plt.subplots(2, len(MODELS), figsize=(9, 6.4), sharex=True, layout="constrained")
    for model, (memory, seconds) in zip(MODELS, panels.T):
        for pod, colour in COLOURS.items():
            cells = [cell for cell in CELLS if cell[:2] == (model, pod)]
            compiled = [(cell, table[wanted(cell)]) for cell in cells if wanted(cell) in table]
            for panel, closed in ((memory, "memory"), (seconds, "seconds")):
                heights = [getattr(expected[cell], closed) for cell in cells]
                heights = heights if closed == "memory" else [limits[0] for limits in heights]
                panel.plot(
                    [cell.length + ASIDE[pod] for cell in cells], heights, "--", color=colour, lw=1.2, label=PODS[pod]
                )
            limit = topology.device(pod).memory
            for cell, found in compiled:
                peak = found.get("peak_gib", limit + found["over_gib"])
                mark = {"color": colour, "ms": 6, "mew": 2}
                known = "v" if found.get("on_host_gib") else "o"
                memory.plot(cell.length + ASIDE[pod], peak, known if found["fits"] else "x", **mark)
                if "seconds_step" in found:
                    seconds.plot(cell.length + ASIDE[pod], found["seconds_step"], "o" if found["fits"] else "x", **mark)
        for limit, name in ((95, "a v5p has"), (32, "a v6e has")):
            memory.axhline(limit, color="grey", lw=0.8)
            memory.text(135_000, limit + 1, name, fontsize=8, color="grey", ha="center")
        memory.set(title=model.capitalize(), ylim=(0, 105))
        seconds.set(xlabel="tokens of a row", ylim=(0, 17))
        seconds.set_xticks(list(ROWS), [f"{length:,}" for length in ROWS], fontsize=8)
    polish(figure, panels, path)


def polish(figure, panels, path: pathlib.Path) -> None:
    panels[0, 0].set_ylabel("GiB a chip")
    panels[1, 0].set_ylabel("seconds of a step, estimated")
    panels[1, 0].legend(
        fontsize=8,
        title="lines: closed form\ndots: compiled\n(v: at most, x: does not fit)",
        title_fontsize=8,
        loc="upper left",
    )
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=90)
    temporary.replace(path)


def main(_) -> None:
    path = pathlib.Path(TABLE.value)
    table = json.loads(path.read_text()) if path.is_file() else {}
    for file in sorted(pathlib.Path(PLANS.value).glob("*.json")) if PLANS.value else ():
        table |= dict([row(json.loads(file.read_text()))])
    if COMMANDS.value:
        for cell in CELLS:
            if wanted(cell) not in table:
                name = f"{cell.model}-{cell.pod.replace(':', '-')}-{cell.length}"
                print(f"python -m experiments.plan {cell.flags} --json=.cache/scaling/{name}.json")
        return
    expected = {cell: cell.expected() for cell in CELLS}
    show(table, expected)
    draw(pathlib.Path(PLOT.value), table, expected)
    if PLANS.value:
        path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    output.finish(
        {
            f"{cell.model}, {PODS[cell.pod]}, {cell.length} tokens": text(table.get(wanted(cell)), expected[cell])
            for cell in CELLS
        }
    )


if __name__ == "__main__":
    app.run(main)
