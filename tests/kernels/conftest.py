"""What tests that compile for TPUs share: a process of its own, for libtpu starts once in each and wants its own settings."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def printed(root):
    """Runs a file as a program that may start libtpu; returns what it printed, a JSON object or string a line."""

    def run(file: str) -> list:
        environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        environment.pop("XLA_FLAGS", None)
        environment["PYTHONPATH"] = str(root)
        ran = subprocess.run([sys.executable, file], cwd=root, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith(("{", '"'))]

    return run
