"""Several processes of one program on this machine's CPU, as a cluster would start them on several machines.

    python -m launch.local --processes=4 -- python -m experiments.pretrain_nano --mesh=fsdp=2,expert=2

Each process finds the others by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Its output comes line by line
behind its number. When one fails or is killed, the others, which would wait for it, are stopped, and the message names it.
SIGTERM and SIGINT are passed on, so that all save and end; on Linux the processes get SIGTERM too when the launcher is
killed. The status is that of the process that failed first, 128 + signal
for one that was killed, and 0 when all succeeded. Run the same command again to resume.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from absl import app, flags

PROCESSES = flags.DEFINE_integer("processes", 2, "how many to start", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "simulated CPU devices in each process", lower_bound=1)
GRACE = flags.DEFINE_float("grace", 60.0, "seconds to save and end in after SIGTERM or SIGINT, before SIGKILL")

_PAUSE = 0.02  # seconds between looks at the processes
_STOP_SECONDS = 5.0  # for processes that can do nothing useful any more
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_LOCK = threading.Lock()  # lines of several processes never mix


def environment(base: Mapping[str, str], address: str, count: int, index: int, devices: int) -> dict[str, str]:
    """What process `index` of `count` gets: where process 0 listens, who it is itself, and its simulated devices."""
    forced = f"--xla_force_host_platform_device_count={devices}"
    added = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        # Of two settings of one flag XLA takes the last.
        "XLA_FLAGS": " ".join(filter(None, [base.get("XLA_FLAGS"), forced])),
        "PYTHONUNBUFFERED": "1",
    }
    return dict(base) | added


def describe(status: int) -> str:
    """A return code of `subprocess` in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class Group:
    """Processes that live and die together."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self._copiers: list[threading.Thread] = []
        self._started, self._asked = time.monotonic(), None  # _asked: (signal passed on, when)

    def start(self, command: Sequence[str], count: int, devices: int = 1) -> None:
        """Starts `count` processes with `devices` simulated devices each."""
        address = f"127.0.0.1:{_free_port()}"
        self.processes = [
            subprocess.Popen(
                list(command),
                env=environment(os.environ, address, count, index, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
                preexec_fn=_end_with_launcher if sys.platform == "linux" else None,
            )
            for index in range(count)
        ]
        self._copiers = [
            threading.Thread(target=_copy, args=(stream, sink, f"[{index}] ".encode()), daemon=True)
            for index, process in enumerate(self.processes)
            for stream, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
        ]
        for thread in self._copiers:
            thread.start()
        if self._asked is not None:  # meanwhile
            self._send(self._asked[0])

    def pass_on(self, number: int, _=None) -> None:
        """Sends a signal to all that still run, which are then to end by themselves; serves as a handler."""
        self._asked = (number, time.monotonic())
        self._send(number)

    def wait(self, grace: float) -> int:
        """Waits until all have ended, which it sees to when one fails; returns the status for the launcher to end with."""
        first: list[int] = []
        while self._running():
            if self._asked is None:
                first = self._failed()
                if first:
                    self._stop_others(first)
                    break
            elif time.monotonic() > self._asked[1] + grace:
                _say(
                    f"{self._running()} still run {grace:g} s after {signal.Signals(self._asked[0]).name}; killing them"
                )
                self._kill()
            time.sleep(_PAUSE)
        for thread in self._copiers:
            thread.join()
        return self._conclude(first or self._failed())

    def _running(self) -> int:
        return sum(process.poll() is None for process in self.processes)

    def _failed(self) -> list[int]:
        """The process that failed: of several those that were killed, for the others died of their death.

        On a busy machine a process that another's error has ended may be seen at the same moment; then both are named.
        """
        failed = [index for index, process in enumerate(self.processes) if process.poll()]
        worst = min((self.processes[index].returncode for index in failed), default=None)
        return [index for index in failed if self.processes[index].returncode == worst]

    def _named(self, first: list[int]) -> str:
        names = " and ".join(map(str, first))
        return f"process{'es' if len(first) > 1 else ''} {names} {describe(self.processes[first[0]].returncode)}"

    def _stop_others(self, first: list[int]) -> None:
        seconds = time.monotonic() - self._started
        _say(f"{self._named(first)} after {seconds:.1f} s; stopping the other {len(self.processes) - len(first)}")
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._running() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        self._kill()  # those that hang in a collective operation, and hear no signal there
        for process in self.processes:
            process.wait()

    def _conclude(self, first: list[int]) -> int:
        if not first:
            return 0
        status = self.processes[first[0]].returncode
        _say(f"{self._named(first)}; all {len(self.processes)} have ended. The same command resumes the run")
        return 128 - status if status < 0 else status

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self) -> None:
        """All that still run, and what they have started, which would hold our pipes open."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _end_with_launcher() -> None:
    """Asks the kernel to send this process SIGTERM when its parent is gone, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _copy(stream: IO[bytes], sink: IO[bytes], prefix: bytes) -> None:
    """Copies lines as they come, each behind `prefix`; a progress bar's returns count as ends of lines."""
    rest = b""
    while chunk := stream.read1():
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        _write(sink, prefix, lines)
    _write(sink, prefix, [rest])


def _write(sink: IO[bytes], prefix: bytes, lines: Sequence[bytes]) -> None:
    with _LOCK:
        sink.write(b"".join(prefix + line + b"\n" for line in lines if line.strip()))
        sink.flush()


def _say(message: str) -> None:
    _write(sys.stderr.buffer, b"launch: ", [message.encode()])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(arguments: Sequence[str]) -> int:
    command = arguments[1:]
    if not command:
        raise app.UsageError("wanted a command after `--`, such as python -m experiments.pretrain_nano; got none")
    group = Group()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, group.pass_on)
    group.start(command, PROCESSES.value, DEVICES.value)
    return group.wait(GRACE.value)


if __name__ == "__main__":
    app.run(main)
