"""What the TPU compiler says of a program, asked once: answers lie in a folder under a hash of all that decides them.

The hash is of the lowered program's text, so that any change of model, mesh, batch or code asks anew, and of the topology
and the compiler's version. The compiled text is kept whole: what is counted in it may change and costs no compilation.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import resource
import time
import types
from collections.abc import Mapping

import jax

# Gathers and scatters of the SparseCore stand in the program's text in a form that JAX's own reader refuses.
OPTIONS = {
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
NONE = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A compiled program, of one device: bytes, the compiler's own estimate of seconds, and the scheduled text.

    Invariant: where the compiler refused the program, `over` is above 0, and there are no bytes and no text.
    """

    compile_seconds: float
    host_gib: float  # most memory that the process had held by then
    over: float = 0.0  # GiB more than the device has
    peak: int = 0  # held at most at once
    on_host: int = 0  # kept in the memory of the device's host meanwhile
    temporaries: int = 0  # what is neither argument nor result
    in_place: int = 0  # results that are written where arguments lay
    schedule_seconds: float = 0.0  # loop bodies counted once
    text: str = ""
    recalled: bool = False  # whether it was found in the folder

    def excess(self, memory: float) -> float:
        """Bytes that the program needs above `memory`, 0 where it fits; of a refused one `over` says it."""
        # The compiler refuses what does not fit. Where the host keeps something, `peak` is a bound that says no more.
        return 0.0 if self.on_host else max(self.peak - memory, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """A folder of answers.

    folder: where they are looked up and kept; None keeps nothing. fresh: asks anew, and keeps the new answer.
    flags: what the compiler is told besides, as in LIBTPU_INIT_ARGS; another text is another question.
    """

    folder: pathlib.Path | None = None
    fresh: bool = False
    flags: str = ""

    def ask(self, lowered: jax.stages.Lowered, topology: str, options: Mapping[str, str] = NONE) -> Answer:
        """The answer for the devices that `lowered` was made for; that it does not fit is an answer too.

        options: what the compiler is told of this program.
        """
        options = OPTIONS | options
        if self.folder is None:
            return _compile(lowered, options)
        path = self.folder / f"{self.key(lowered, topology, options)}.json.gz"
        if path.is_file() and not self.fresh:
            return Answer(**json.loads(gzip.decompress(path.read_bytes())) | {"recalled": True})
        answer = _compile(lowered, options)
        _keep(answer, path)
        return answer

    def key(self, lowered: jax.stages.Lowered, topology: str, options: Mapping[str, str]) -> str:
        """A hash of everything that an answer depends on, and of what it consists of."""
        versions = [importlib.metadata.version(name) for name in ("jaxlib", "libtpu")]
        fields = [field.name for field in dataclasses.fields(Answer)]
        rest = json.dumps([topology, options, self.flags, versions, fields])
        return hashlib.sha256((rest + lowered.as_text()).encode()).hexdigest()[:32]


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, str]) -> Answer:
    start = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        over = _excess(str(error))
        if over is None:
            raise
        return Answer(compile_seconds=time.perf_counter() - start, host_gib=_host_gib(), over=over)
    memory = program.memory_analysis()
    return Answer(
        compile_seconds=time.perf_counter() - start,
        host_gib=_host_gib(),
        peak=_peak(memory),
        on_host=memory.host_temp_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        schedule_seconds=program.cost_analysis().get("optimal_seconds", float("nan")),
        text=program.as_text(),
    )


def _peak(memory) -> int:
    """Bytes of the device held at most at once; of a program that keeps some on its host a bound.

    Arguments and temporaries added up are more than are ever held at once, but where the host keeps something, the stated
    peak is of that and the arguments.
    """
    if memory.host_temp_size_in_bytes:
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def _excess(message: str) -> float | None:
    """GiB by which the compiler refuses a program, which it says in two ways; None of any other refusal."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    by = re.search(r"xceeded hbm capacity by ([\d.]+)([KMG])", message)
    if by:
        return _gib(*by.groups())
    of = re.search(
        r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", message
    )
    return _gib(*of.groups()[:2]) - _gib(*of.groups()[2:]) if of else None


def _gib(number: str, unit: str) -> float:
    return float(number) / {"G": 1, "M": 2**10, "K": 2**20}[unit]


def _host_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _keep(answer: Answer, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(answer)).encode(), mtime=0))
    temporary.replace(path)
