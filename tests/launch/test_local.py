"""Real processes: the run of one process, and what happens when one dies, fails, or is told to stop."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llama4_jax.checkpoint.store import load_params
from llama4_jax.train import metrics

PROGRAM = pathlib.Path(__file__).with_name("spread_run.py")
PATH = {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), str(PROGRAM.parents[1] / "train")])}
RUN = ("--steps", "10")  # saved after steps 3, 6, 9 and 10


def launch(root, processes: int, *command: str, options=(), **environment) -> subprocess.CompletedProcess:
    """The launcher's status and output, within a minute after the processes have started."""
    line = [sys.executable, "-m", "launch.local", f"--processes={processes}", *options, "--", *command]
    variables = os.environ | PATH | environment
    return subprocess.run(line, cwd=root, env=variables, capture_output=True, text=True, timeout=300)


def train(root, folder, processes: int, mesh: str, *arguments: str, options=(), **environment):
    command = [sys.executable, str(PROGRAM), str(folder), "--mesh", mesh, *arguments]
    return launch(root, processes, *command, options=options, **environment)


def alone(folder, *arguments: str) -> None:
    """The same run in one process on one device."""
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    ran = subprocess.run(command, env=os.environ | PATH, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def losses(folder) -> list[float]:
    lines = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> pathlib.Path:
    """An undisturbed run of four processes."""
    folder = tmp_path_factory.mktemp("whole")
    ran = train(root, folder, 4, "fsdp=2,expert=2", *RUN)
    assert ran.returncode == 0, ran.stderr
    assert {line for line in ran.stdout.splitlines() if "done" in line} == {f"[{index}] done" for index in range(4)}
    assert "where the time went" in ran.stderr
    return folder


@pytest.fixture(scope="module")
def killed(root, tmp_path_factory) -> pathlib.Path:
    """The same, of which process 2 was killed after step 8."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ("--victim", "2", "--strike", "8", "--after", "6", "--signal", "SIGKILL")
    ran = train(root, folder, 4, "fsdp=2,expert=2", *RUN, *arguments)
    assert ran.returncode == 128 + signal.SIGKILL
    # Before that it says that it stops the others, unless their own errors have ended them before it looked.
    assert re.search(r"^launch: process 2 was killed by SIGKILL; all 4 have ended\. The same", ran.stderr, re.M)
    assert "[0] step 8" in ran.stdout and "[0] step 10" not in ran.stdout
    return folder


def test_four_processes_train_as_one_does(tmp_path, whole):
    alone(tmp_path, *RUN)
    np.testing.assert_allclose(losses(whole), losses(tmp_path), rtol=1e-6)
    (params, records), (wanted, wanted_records) = (load_params(each / "checkpoints") for each in (whole, tmp_path))
    for name, value in params.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6, err_msg=name)
    assert records["data"] == wanted_records["data"]


def test_after_a_kill_the_same_command_ends_with_the_same_bits(root, tmp_path, whole, killed):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    ran = train(root, tmp_path, 4, "fsdp=2,expert=2", *RUN)
    assert ran.returncode == 0 and f"resuming {tmp_path} at step 6" in ran.stderr, ran.stderr
    assert losses(tmp_path) == losses(whole)
    (params, records), (wanted, wanted_records) = (load_params(each / "checkpoints") for each in (tmp_path, whole))
    assert records["data"] == wanted_records["data"]
    for name, value in params.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    # Steps 7 and 8 were taken twice.
    assert 0 < metrics.read(tmp_path / "metrics.jsonl")[-1]["goodput/lost"] < 1


def test_two_processes_go_on_where_four_were_and_agree_that_the_newest_checkpoint_is_damaged(
    root, tmp_path, whole, killed
):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "6" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])
    ran = train(root, tmp_path, 2, "data=2", *RUN)
    assert ran.returncode == 0 and f"resuming {tmp_path} at step 3" in ran.stderr, ran.stderr
    assert (tmp_path / "checkpoints" / "6.damaged").is_dir()
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-6)


def test_a_signal_to_one_process_stops_all_at_one_step_which_is_saved(root, tmp_path):
    ran = train(root, tmp_path, 2, "fsdp=2", *RUN, "--victim", "1", "--strike", "4", "--signal", "SIGTERM")
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert "SIGTERM: saved step 5 of 10" in ran.stderr
    assert {f"[{index}] step {step}" for index in range(2) for step in range(1, 6)} <= set(ran.stdout.splitlines())
    assert "step 6" not in ran.stdout
    assert (tmp_path / "checkpoints" / "5" / "params").is_dir()


def test_an_error_in_one_process_ends_all_and_is_seen(root, tmp_path):
    ran = train(root, tmp_path, 2, "fsdp=2", *RUN, "--fail", "2")
    assert ran.returncode == 1
    assert "[1] RuntimeError: this process alone has had enough" in ran.stderr
    assert re.search(r"^launch: process(es 0 and)? 1 ended with status 1", ran.stderr, re.M)
    assert "step 3" not in ran.stdout


@pytest.mark.thorough
def test_a_model_with_pictures_and_experts_has_the_losses_of_one_device(root, tmp_path):
    """Each process draws only the pictures that its devices look at: two of three, and one."""
    arguments = ("--model", "llama", "--steps", "2")
    ran = train(root, tmp_path / "spread", 2, "fsdp=2,expert=2", *arguments, options=("--devices=2",))
    assert ran.returncode == 0, ran.stderr
    alone(tmp_path / "alone", *arguments)
    np.testing.assert_allclose(losses(tmp_path / "spread"), losses(tmp_path / "alone"), rtol=1e-5)


def test_lines_carry_the_number_of_their_process_and_returns_of_a_bar_end_lines(root):
    ran = launch(root, 2, "sh", "-c", r'printf "one $JAX_PROCESS_ID of $JAX_NUM_PROCESSES\rtwo\n\nthree"; echo no >&2')
    assert ran.returncode == 0
    wanted = [f"[{i}] {text}" for i in range(2) for text in (f"one {i} of 2", "two", "three")]
    assert sorted(ran.stdout.splitlines()) == sorted(wanted)
    assert sorted(ran.stderr.splitlines()) == ["[0] no", "[1] no"]


def test_a_status_is_passed_on_with_the_name_of_its_process(root):
    started = time.monotonic()
    ran = launch(root, 3, "sh", "-c", "[ $JAX_PROCESS_ID = 1 ] && exit 3; trap '' TERM; sleep 100 & wait; sleep 100")
    assert ran.returncode == 3
    assert re.search(r"^launch: process 1 ended with status 3 after \d+\.\d s; stopping the other 2$", ran.stderr, re.M)
    assert time.monotonic() - started < 60  # though the others ignore SIGTERM


@pytest.mark.parametrize("ending, status", [("exit 143", 143), ("sleep 100", 137)])
def test_a_signal_to_the_launcher_reaches_all_and_the_deaf_are_killed_after_the_grace(root, ending, status):
    script = f"trap 'echo saved; {ending}' TERM; echo ready; while :; do sleep 0.05; done"
    line = [sys.executable, "-m", "launch.local", "--processes=2", "--grace=1", "--", "sh", "-c", script]
    with subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert {launcher.stdout.readline(), launcher.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(signal.SIGTERM)
        rest, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == status, errors
    assert sorted(rest.splitlines()) == ["[0] saved", "[1] saved"]
    assert ("killing them" in errors) == (status == 137)


def test_no_command_is_an_error_that_shows_one(root):
    ran = launch(root, 2)
    assert ran.returncode != 0 and "python -m experiments.pretrain_nano" in ran.stdout + ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_no_process_outlives_a_launcher_that_is_killed(root):
    waits = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(120)"
    line = [sys.executable, "-m", "launch.local", "--processes=2", "--", sys.executable, "-c", waits]
    launcher = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True)
    children = [int(launcher.stdout.readline().split()[-1]) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if _alive(child)]
    launcher.stdout.close()


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
