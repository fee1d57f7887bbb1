"""The main job at toy size, from the command line to its report, and run again."""

import json
import re
import shutil

import pytest
from PIL import Image

from llama4_jax.train import metrics


@pytest.fixture(scope="module")
def results(toy_run) -> dict:
    return json.loads((toy_run.folder / "results.json").read_text())


def test_results_hold_every_number_that_is_claimed(results):
    assert results.keys() == {
        *("accuracy", "accuracy_by_language", "accuracy_shuffled_images", "accuracy_untrained_pairs"),
        *("questions", "untrained_pairs", "emoji", "seed", "steps", "parameters", "minutes"),
    }
    assert results["accuracy_by_language"].keys() == {"en", "de"}
    shares = [value for name, value in results.items() if name.startswith("accuracy_") and isinstance(value, float)]
    assert all(0 <= share <= 1 for share in [*shares, *results["accuracy_by_language"].values()])
    assert results["questions"] + results["untrained_pairs"] == 6 * 2
    assert results["untrained_pairs"] > 0
    assert (results["emoji"], results["seed"], results["steps"]) == (6, 1, 4)


def test_json_gets_the_same_numbers_and_the_screen_too(toy_run, results):
    assert json.loads((toy_run.folder / "copy.json").read_text()) == results
    assert re.search(rf"^parameters +{results['parameters']}$", toy_run.process.stdout, re.MULTILINE)
    assert toy_run.process.stdout.endswith(f"report: {toy_run.folder / 'report.html'}\n")


def test_metrics_are_logged_and_held_out_questions_asked_on_the_way(toy_run):
    records = metrics.read(toy_run.folder / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [2, 4]
    assert [record["step"] for record in records if "heldout_accuracy" in record] == [1, 2, 3, 4]


def test_the_report_shows_curves_load_and_pictures(toy_run, results):
    page = (toy_run.folder / "report.html").read_text(encoding="utf-8")
    for name in ("names", "curves", "expert_load"):
        assert f'<img alt="{name}" src="data:image/png;base64,' in page
        assert min(Image.open(toy_run.folder / f"{name}.png").size) > 100
    assert "Deutsch" in page
    assert "OpenMoji" in page  # the licence asks for it
    assert f"{results['questions']} new renderings of 6 emoji" in page


def test_the_same_command_finds_the_run_finished_and_trains_no_more(toy_run, results, script, tmp_path):
    folder = shutil.copytree(toy_run.folder, tmp_path / "copied")  # other workers read the one that all share
    (folder / "report.html").unlink()
    logged = (folder / "metrics.jsonl").read_text()
    moved = [part.replace(str(toy_run.folder), str(folder)) for part in toy_run.arguments]
    again = script("pretrain_nano", *moved)
    assert f"resuming {folder} at step 4" in again.stdout + again.stderr
    assert (folder / "metrics.jsonl").read_text() == logged
    assert (folder / "report.html").exists()
    repeated = json.loads((folder / "results.json").read_text())
    assert repeated | {"minutes": 0} == results | {"minutes": 0}
