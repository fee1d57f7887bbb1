"""A training run as a page that a person can read: curves, expert load, and pictures with the model's names.

Everything is drawn from the run's `metrics.jsonl` and the answers to held-out questions.
"""

from __future__ import annotations

import base64
import io
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from llama4_jax.eval.naming import Answer

RIGHT, WRONG, NEUTRAL = "#1a7f37", "#b42318", "#3b5b92"


def loss_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, accuracy on held-out renderings where it was measured, and learning rate, against minutes."""
    logged = [record for record in records if "loss" in record]
    asked = [record for record in records if "heldout_accuracy" in record]
    minutes = {record["step"]: record["seconds"] / 60 for record in logged}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot([*minutes.values()], [record["loss"] for record in logged], color=NEUTRAL, lw=1)
    left.set(xlabel="minutes of training", ylabel="loss (nats per token)", title="Training loss", ylim=(0, None))
    times = np.interp([record["step"] for record in asked], [*minutes], [*minutes.values()]) if asked else []
    right.plot(times, [100 * record["heldout_accuracy"] for record in asked], "o-", color=RIGHT)
    right.set(xlabel="minutes of training", ylabel="exact names, %", title="Held-out renderings", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def expert_load(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Each expert's share of the tokens over time, one panel a mixture layer; an even load is the dashed line."""
    logged = [record for record in records if "load" in record]
    if not logged:
        figure = plt.figure(figsize=(5.2, 1))
        figure.text(0.5, 0.5, "no mixture layers: nothing was routed", ha="center")
        return figure
    load = np.array([record["load"] for record in logged])  # [time layers experts]
    steps = [record["step"] for record in logged]
    layers, experts = load.shape[1:]
    figure, panels = plt.subplots(
        1, layers, figsize=(2.6 * layers, 2.6), sharey=True, layout="constrained", squeeze=False
    )
    for layer, axes in enumerate(panels[0]):
        axes.stackplot(steps, load[:, layer].T, colors=plt.get_cmap("viridis")(np.linspace(0.1, 0.95, experts)))
        for edge in range(1, experts):
            axes.axhline(edge / experts, color="white", lw=0.6, ls=":")
        axes.set(
            title=f"mixture layer {layer}", xlabel="step", ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1))
        )
    panels[0][0].set_ylabel(f"share of tokens, {experts} experts")
    return figure


def answer_sheet(answers: Sequence[Answer], columns: int = 6) -> Figure:
    """Pictures with the model's name, green where exact, and the truth under it where not."""
    rows = -(-len(answers) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.1 * columns, 1.95 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, answer in zip(panels.flat, answers):
        axes.imshow((answer.question.image + 1) / 2, interpolation="nearest")
        said = f"{answer.question.language}: {drawable(answer.said)}"
        title = said if answer.right else f"{said}\n({drawable(answer.question.name)})"
        axes.set_title(title, fontsize=8, color=RIGHT if answer.right else WRONG)
    return figure


def drawable(text: str) -> str:
    """`text` with unprintable characters replaced, as a plot's label: what an untrained model says may be anything."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return kept[:40].replace("$", r"\$") or "(nothing)"


def write(
    folder: str | pathlib.Path,
    title: str,
    figures: Mapping[str, Figure],
    tables: Mapping[str, list],
    notes: Sequence[str],
) -> pathlib.Path:
    """Writes each figure as `NAME.png` and all of it as one self-contained `report.html`, whose path it returns.

    tables: caption to rows; the first row is the head.
    """
    folder = pathlib.Path(folder)
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        (folder / f"{name}.png").write_bytes(buffer.getvalue())
        pictures[name] = base64.b64encode(buffer.getvalue()).decode()
    page = _PAGE.render(title=title, pictures=pictures, tables=tables, notes=notes)
    path = folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


_PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
  img { max-width: 100% } table { border-collapse: collapse }
  td, th { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
  td:first-child, th:first-child { text-align: left } .note { color: #555; font-size: .85rem }
</style></head><body>
<h1>{{ title }}</h1>
{% for caption, rows in tables.items() %}<h2>{{ caption }}</h2>
<table><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for name, picture in pictures.items() %}<h2>{{ name.replace("_", " ").capitalize() }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">{% endfor %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
</body></html>
""")
