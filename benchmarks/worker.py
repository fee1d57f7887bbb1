"""One side of a comparison in a process of its own, driven over a pipe, so that only one side runs at a time.

torch's and XLA's thread pools slow each other down inside one process. Here the parent sends one request, waits for
its answer, and only then turns to the other side; a waiting worker sleeps in `read` and uses no core.
Requests and answers are JSON, one a line; whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Worker:
    """The parent's end: `worker.call("prefill", length=1024)` returns what that function of the module returns."""

    def __init__(self, module: str, *arguments: str):
        self.name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,  # where `benchmarks` can be imported from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, function: str, **arguments: Any) -> Any:
        """Runs one function in the worker; raises RuntimeError with the worker's own message if it failed."""
        self._process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()} while running {function}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}.{function}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's end: answers requests until the pipe closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": functions[request["function"]](**request["arguments"])}
        except Exception as error:  # the parent decides whether a failed variant ends the comparison
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)
