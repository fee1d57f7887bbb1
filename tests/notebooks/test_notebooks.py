"""Every notebook runs from its first cell to its last, in a process of its own, and draws what it promises."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COUNT_PICTURES = """
import matplotlib.pyplot as plt
pictures = []
plt.show = lambda: (pictures.append(plt.gcf()), plt.close("all"))
"""


def sources(path: pathlib.Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs_and_shows_its_pictures(path, tmp_path):
    cells = sources(path)
    program = "\n\n".join([COUNT_PICTURES, *cells, "print('pictures', len(pictures))"])
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(path.parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    wanted = sum(cell.count("plt.show()") for cell in cells)
    assert wanted > 0
    assert run.stdout.splitlines()[-1] == f"pictures {wanted}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_is_committed_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), "clear the outputs: they are stale the day after"
