"""The comparison of training for int4 with rounding to it, at toy size, from the command line to its plot; and run again."""

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.thorough  # three training runs; what is drawn and asserted is in tests/eval/test_comparison.py


def test_every_variant_is_measured_and_the_same_command_trains_nothing_again(script, tmp_path):
    sizes = ["--seeds=1", "--heldout=1", "--calibration=1", "--vocab_size=400", "--data", "num_emoji=6"]
    command = ["qat_int4", f"--folder={tmp_path}", *sizes, "--train", "steps=5", "--tolerance=100"]
    first = script(*command, "--json", str(tmp_path / "copy.json"))
    results = json.loads((tmp_path / "copy.json").read_text())
    assert len(results["loss"]) == len(results["accuracy"]) == 5
    assert len({tuple(loss) for loss in results["loss"].values()}) == 5  # rounding shows in every one
    assert Image.open(tmp_path / "qat_int4.png").width > 500
    assert "resuming" in first.stderr and "at step 4" in first.stderr  # the last fifth, from the full run's checkpoint

    script(*command, "--json", str(tmp_path / "again.json"))
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["loss"], again["accuracy"]) == (results["loss"], results["accuracy"])
    wrong = script(*command[:-1], "--tolerance=-100", status=1)
    assert "held-out losses are not in the expected order: full precision" in wrong.stderr
