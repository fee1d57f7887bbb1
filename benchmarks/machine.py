"""What else the machine is doing: a timing taken while other programs run is not a timing.

Read from Linux's `/proc`. torch loses up to ten times its speed when its threads share cores with anything else, so a
comparison made on a busy machine flatters the other side; the benchmarks refuse to print one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable

FOREIGN_SHARE = 0.08  # of all cores: above this, somebody else is using the machine
HIGHEST_AVERAGE = 0.75  # load average of the last minute, per core
PATIENCE = 120.0  # seconds in which what has just ended, such as the benchmark before, may leave that average
TICKS = os.sysconf("SC_CLK_TCK")


class Loaded(RuntimeError):
    """The machine is too busy to measure on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """CPU seconds spent until now, by everybody and by the processes under test."""

    wall: float  # seconds, monotonic
    busy: float  # CPU seconds of the whole machine, stolen time included
    ours: float  # CPU seconds of the processes under test


def snapshot(pids: Iterable[int] = ()) -> Snapshot:
    """CPU use until now; `pids` are the processes under test, besides this one."""
    user, nice, system, _, _, interrupt, soft, steal, *_ = map(
        int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    ours = sum(_process_seconds(pid) for pid in (os.getpid(), *pids))
    busy = (user + nice + system + interrupt + soft + steal) / TICKS
    return Snapshot(wall=time.monotonic(), busy=busy, ours=ours)


def foreign_share(before: Snapshot, after: Snapshot) -> float:
    """The share of all cores that other programs used between two snapshots, 0 to 1."""
    capacity = max((after.wall - before.wall) * os.cpu_count(), 1e-9)
    return max(0.0, (after.busy - before.busy) - (after.ours - before.ours)) / capacity


def require_quiet(pids: Iterable[int] = (), *, seconds: float = 1.0, check_average: bool = False) -> None:
    """Raises Loaded if other programs use more than FOREIGN_SHARE of the cores over `seconds`.

    check_average: also refuse when the load average of the last minute says that something large has just run, and still
    does after a while; for the start of a benchmark, before its own work counts in that average.
    """
    highest = HIGHEST_AVERAGE * os.cpu_count()
    patient_until = time.monotonic() + PATIENCE
    while check_average and os.getloadavg()[0] > highest and time.monotonic() < patient_until:
        time.sleep(1.0)
    before = snapshot(pids)
    time.sleep(seconds)
    share = foreign_share(before, snapshot(pids))
    average = os.getloadavg()[0]
    if share > FOREIGN_SHARE or (check_average and average > highest):
        raise Loaded(
            f"the machine is loaded: other programs use {share:.0%} of its {os.cpu_count()} cores (at most "
            f"{FOREIGN_SHARE:.0%} wanted), load average {average:.2f}. Stop them and run this again, or pass "
            "--anyway to see the seconds without ratios."
        )


def peak_memory_reset() -> None:
    """Forgets this process's peak so far: frees what malloc keeps, then lets the kernel start counting anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the largest resident set of this process since `peak_memory_reset`."""
    return _status_bytes("VmHWM")


def resident_memory() -> int:
    """Bytes: the resident set of this process now."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory needs Linux")


def _process_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # user and system time of all threads
