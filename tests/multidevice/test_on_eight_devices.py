"""Everything in this folder that is marked `multidevice` runs in one process of its own, which has eight CPU devices."""

import os
import subprocess
import sys

import pytest


def run(root, marked):
    """Failures are printed as pytest prints them: read them there."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "pytest", "-m", marked, "-p", "no:cacheprovider", "tests/multidevice"]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout, ran.stdout


def test_every_test_that_needs_eight_devices_passes(root):
    run(root, "multidevice and not thorough")


@pytest.mark.thorough
def test_more_meshes_pass(root):
    run(root, "multidevice and thorough")
