"""A run that is killed, poisoned or damaged ends as the undisturbed one, or says why not."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny_run import CountingLoader

from llama4_jax.checkpoint.store import Store, load_params
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.train import loop, metrics

PROGRAM = pathlib.Path(__file__).with_name("tiny_run.py")


def run(folder, *, loader=None, callbacks=(), **changes):
    """A bigram run of 20 steps that saves every 5."""
    config = TrainConfig(**{"steps": 20, "save_every": 5, "log_every": 2, "optimizer": OptimizerConfig()} | changes)
    state, take = bigram.assemble(config)
    return loop.train(state, take, loader or CountingLoader(), config, folder=folder, callbacks=callbacks)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(folder, *arguments) -> subprocess.Popen:
    path = [str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def wait_for_step(process: subprocess.Popen, number: int) -> None:
    for line in process.stdout:
        if line.strip() == f"step {number}":
            return
    raise AssertionError(f"the run ended before step {number}: {process.stderr.read()}")


def whole_checkpoints(folder: pathlib.Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def test_a_run_killed_three_times_at_random_steps_ends_with_the_same_bits(tmp_path):
    finish(start(tmp_path / "whole"))
    strikes = sorted(random.Random(os.urandom(4)).sample(range(2, 24), 3))
    for strike in strikes:
        process = start(tmp_path / "killed", "--pace", "0.05")
        wait_for_step(process, strike)
        if strike == strikes[-1]:  # saving goes on beside the steps, and the last run has to find something
            while not whole_checkpoints(tmp_path / "killed") and process.stdout.readline():
                pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert whole_checkpoints(tmp_path / "killed"), strikes
    errors = finish(start(tmp_path / "killed"))
    assert "resuming" in errors, (strikes, errors)

    whole, killed = (load_params(tmp_path / name / "checkpoints") for name in ("whole", "killed"))
    assert bigram.equal(whole[0], killed[0]), strikes
    assert whole[1]["data"] == killed[1]["data"]
    lines = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [(line["step"], line["loss"]) for line in lines[0]] == [(line["step"], line["loss"]) for line in lines[1]]
    assert [line["step"] for line in lines[0]] == list(range(1, 25))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_once_and_the_same_call_resumes(tmp_path, number, capfd):
    whole = run(tmp_path / "whole")
    strike = loop.Callback(1, lambda params, step: os.kill(os.getpid(), number) if step == 7 else None)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "stopped", callbacks=[strike])
    assert caught.value.code == 128 + number and caught.value.step == 8
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert f"{number.name}: saved step 8 of 20" in said and "run the same command again to resume" in said
    with Store(tmp_path / "stopped" / "checkpoints") as store:
        assert store.steps() == [5, 8]
    assert bigram.equal(run(tmp_path / "stopped"), whole)
    assert "resuming" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_is_touched(tmp_path):
    with pytest.raises(loop.NonFiniteError) as caught:
        run(tmp_path, loader=CountingLoader(poison=9), steps=9)  # the first nine batches are sound
        saved = contents(tmp_path / "checkpoints")
        run(tmp_path, loader=CountingLoader(poison=9), steps=10)
    assert contents(tmp_path / "checkpoints") == saved
    assert caught.value.step == 9 and caught.value.groups == ["embed", "head"]
    message = str(caught.value)
    assert "step 9: loss is" in message and "non-finite gradients in embed, head" in message
    assert "The checkpoint of step 9 is untouched" in message and "on_nan='rollback'" in message


def test_rollback_goes_to_the_last_checkpoint_and_on_without_the_batch(tmp_path):
    class Recorder(CountingLoader):
        used = ()

        def __next__(self):
            self.used += (self.index,)
            return super().__next__()

    loader = Recorder(poison=7)
    state = run(tmp_path, loader=loader, on_nan="rollback", steps=12)
    # Steps 1-7 used batches 0-6; batch 7 spoilt step 8; steps 6, 7, ... were taken again with batches 8, 9, ...
    assert loader.used == tuple(range(15))
    assert int(state.step) == 12
    lines = metrics.read(tmp_path / "metrics.jsonl")
    events = [line for line in lines if "rollback" in line]
    assert [line["step"] for line in events] == [5] and "step 7: loss is" in events[0]["rollback"]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]

    expected, take = bigram.assemble(TrainConfig(steps=12))
    clean = CountingLoader()
    for index in [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14]:
        clean.set_state({"index": index})
        expected, _ = take(expected, next(clean))
    assert bigram.equal(state, expected)


def test_rollback_before_the_first_checkpoint_returns_to_the_start(tmp_path):
    state = run(tmp_path, loader=CountingLoader(poison=1), on_nan="rollback", steps=4)
    assert int(state.step) == 4


def test_rollback_gives_up_when_the_fault_is_not_in_the_data(tmp_path):
    class Poisoned(CountingLoader):
        def __next__(self):
            self.poison = self.index
            return super().__next__()

    with pytest.raises(loop.NonFiniteError, match="5 rollbacks in a row did not help"):
        run(tmp_path, loader=Poisoned(), on_nan="rollback")


def test_a_damaged_newest_checkpoint_falls_back_and_ends_with_the_same_bits(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    run(tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "20" / "params"
    for path in newest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])
    assert bigram.equal(run(tmp_path / "damaged"), whole)
    assert "20 cannot be read" in caplog.text and "using step 15" in caplog.text


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    first = run(tmp_path, steps=5)
    assert bigram.equal(run(tmp_path, steps=5), first)


def test_changed_settings_are_shown_on_resuming(tmp_path, capfd):
    run(tmp_path, steps=5)
    run(tmp_path, steps=6, z_loss=0.1)
    assert "changed since it was saved: train_config.steps, train_config.z_loss" in capfd.readouterr().err


def test_accumulation_draws_and_saves_whole_steps(tmp_path):
    loader = CountingLoader()
    state = run(tmp_path, loader=loader, accumulation=3, steps=5)
    assert int(state.step) == 5 and loader.index == 15


def test_callbacks_run_on_schedule_and_at_the_end_and_are_reported(tmp_path):
    seen = []

    def evaluate(params, step):
        seen.append(step)
        return {"eval/accuracy": 0.5, "eval/size": jnp.sum(jnp.abs(params["embed.table"]))}

    run(tmp_path, callbacks=[loop.Callback(4, evaluate)], steps=10)
    assert seen == [4, 8, 10]
    lines = [line for line in metrics.read(tmp_path / "metrics.jsonl") if "eval/accuracy" in line]
    assert [line["step"] for line in lines] == seen and all(line["eval/size"] > 0 for line in lines)


def test_metrics_files_hold_what_a_reader_needs(tmp_path):
    run(tmp_path)
    with (tmp_path / "metrics.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    wanted = {"loss", "objective", "grad_norm", "grad_norm/embed", "learning_rate", "tokens", "tokens_per_second"}
    assert all(wanted <= set(line) for line in lines)
    assert lines[-1]["tokens"] == 20 * 4 * 22  # four rows of 24 with two of padding
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    steps, offset = [], 0
    while offset < len(events):  # length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(events[offset : offset + 8], "little")
        event = Event.FromString(events[offset + 12 : offset + 12 + length])
        steps += [event.step for value in event.summary.value if value.tag == "loss"]
        offset += 16 + length
    assert steps == list(range(2, 21, 2))


def test_half_a_line_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    report = metrics.Reporter(tmp_path, step=1, steps=5)
    report.write(2, {"loss": np.float32(1.5), "load": jax.numpy.ones((1, 2))})
    report.close()
    assert metrics.read(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5, "load": [[1.0, 1.0]]}]


def test_a_loader_that_ends_is_an_error_with_advice(tmp_path):
    class Short(CountingLoader):
        def __next__(self):
            if self.index == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(RuntimeError, match="the loader ended after step 2; make it repeat, or lower train.steps"):
        run(tmp_path, loader=Short())
