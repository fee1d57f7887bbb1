"""Manifests and scripts ask for what was meant, and their flags are known to the compilers that will read them."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from launch import gke, queued, slices, slurm, xla_flags

COMMAND = ("python", "-m", "experiments.pretrain_nano", "--cluster", "--data", "languages=en,de", "it's: # odd")


def job(**changes) -> gke.Job:
    where = slices.parse("v5p:4x4x8")
    return gke.Job(**{"name": "nano", "image": "reg.dev/p/train:1", "command": COMMAND, "slice": where} | changes)


@pytest.mark.parametrize(
    "text, chips, hosts, kind",
    [
        ("v5p:4x4x8", 128, 32, "v5p-256"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v6e:16x16", 256, 64, "v6e-256"),
        ("tpu7x:2x2x1", 4, 1, "tpu7x-8"),
    ],
)
def test_sizes_of_slices(text, chips, hosts, kind):
    where = slices.parse(text)
    assert (where.chips, where.hosts, where.accelerator_type) == (chips, hosts, kind)
    assert where.chips_per_host * where.hosts == chips


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5p:3x4x4", "v5p has no topology '3x4x4'; use one of 2x2x1, 2x2x2"),
        ("v4:2x2x2", "chip 'v4' is unknown; use one of v5e, v5p, v6e, tpu7x"),
        ("v5p", "wanted a chip and a topology such as v5p:4x4x8"),
    ],
)
def test_slices_that_do_not_exist_are_errors_that_name_those_that_do(text, message):
    with pytest.raises(ValueError, match=message):
        slices.parse(text)


def test_every_host_of_every_slice_has_the_same_number_of_chips():
    for chip, kind in slices.CHIPS.items():
        for topology in kind.topologies:
            where = slices.Slice(chip, topology)
            assert where.hosts * where.chips_per_host == where.chips


def test_a_job_set_asks_for_whole_slices_restarts_and_time_to_save():
    text = gke.manifest(job(slices=2, queue="research", restarts=7, grace=90))
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (replicated,) = found["spec"]["replicatedJobs"]
    batch = replicated["template"]["spec"]
    assert replicated["replicas"] == 2 and batch["completionMode"] == "Indexed" and batch["backoffLimit"] == 0
    assert batch["parallelism"] == batch["completions"] == 32
    pod = batch["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 90
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    (container,) = pod["containers"]
    assert container["command"] == list(COMMAND)
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": xla_flags.line("v5p")}]


def test_the_xpk_line_asks_for_the_same():
    words = shlex.split(gke.xpk(job(slices=2, restarts=7, grace=90), "pool"))
    assert words[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert options.pop("command").endswith(shlex.join(COMMAND))
    assert options == {
        **{"cluster": "pool", "workload": "nano", "docker-image": "reg.dev/p/train:1", "tpu-type": "v5p-256"},
        **{"num-slices": "2", "max-restarts": "7", "termination-grace-period-seconds": "90"},
    }


SCOUT = (
    *(
        "python",
        "-m",
        "experiments.pretrain_scout",
        "--cluster",
        "--data=/data/text",
        "--tokenizer=/data/tokenizer.model",
    ),
    "--output=/data/scout",
)


def test_a_recipe_starts_from_each_generator_with_flags_that_it_knows_and_files_that_all_hosts_see(root):
    where = slices.parse("v5p:4x4x8")
    (replicated,) = yaml.safe_load(gke.manifest(job(command=SCOUT, claim="shared")))["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/data"}
    assert volume["persistentVolumeClaim"] == {"claimName": "shared"}
    assert container["command"] == list(SCOUT) and replicated["template"]["spec"]["parallelism"] == 32
    scripts = [queued.script(where, "scout", ("p", "z"), "r", SCOUT, spot=True)]
    scripts.append(slurm.script("scout", "h100", 16, 8, 24, 120, SCOUT))
    assert all(shlex.join(SCOUT) in text for text in scripts)
    assert shlex.join(SCOUT) in " ".join(gke.__doc__.split())  # what is shown there is what runs here
    known = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (root / "experiments" / "pod.py").read_text())
    assert {word.removeprefix("--").split("=")[0] for word in SCOUT[3:]} <= set(known)


@pytest.mark.parametrize("changes", [{"name": "Nano"}, {"name": "n" * 41}, {"command": ()}])
def test_what_kubernetes_would_refuse_is_refused_here(changes):
    with pytest.raises(ValueError, match="use at most 40 lower-case|wanted a command"):
        job(**changes)


def test_the_script_for_queued_resources_runs_the_command_on_all_hosts_of_the_slice(tmp_path):
    text = queued.script(slices.parse("v6e:4x4"), "nano", ("p", "z"), "https://h/r.git", COMMAND, spot=True)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # Run with a gcloud that writes down what it is asked: the slice is there from the second look on.
    (tmp_path / "gcloud").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$*" >> "$0.log"\n'
        'case "$*" in *describe*) [ -e "$0.made" ] && echo ACTIVE ;; *create*) touch "$0.made" ;; esac\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash"], input=text, text=True, check=True, env=os.environ | path, timeout=20)
    asked = (tmp_path / "gcloud.log").read_text()
    assert "queued-resources create nano --project=p --zone=z --node-id=nano --accelerator-type=v6e-16" in asked
    assert "--runtime-version=v2-alpha-tpuv6e --spot" in asked
    assert "tpu-vm ssh nano --project=p --zone=z --worker=all" in asked and shlex.join(COMMAND) in asked


def test_queued_resources_of_a_chip_whose_software_is_unknown_are_refused():
    with pytest.raises(NotImplementedError, match="queued tpu7x resources .* use launch.gke"):
        queued.script(slices.parse("tpu7x:2x2x1"), "nano", ("p", "z"), "r", COMMAND, spot=False)


def test_the_slurm_script_starts_one_process_a_gpu_and_leaves_time_to_save():
    text = slurm.script("nano", "h100", 4, 8, 12, 90, COMMAND)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("4", "8", "8")
    assert options["signal"] == "TERM@90" and options["time"] == "12:00:00" and "requeue" in options
    assert f"srun --kill-on-bad-exit=1 --label {shlex.join(COMMAND)}" in text


COMPILE = """
import jax, numpy
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name=NAME).devices
place = NamedSharding(Mesh(numpy.array(devices), "x"), PartitionSpec("x"))
array = jax.ShapeDtypeStruct((8 * len(devices), 128), "float32", sharding=place)
jax.jit(lambda x: (x @ x.T).sum()).lower(array).compile()
print("compiled")
"""


def compiled(chip: str, topology: str, flags: str) -> subprocess.CompletedProcess:
    code = COMPILE.replace("NAME", repr(f"{chip}:{topology}"))
    variables = os.environ | {"LIBTPU_INIT_ARGS": flags, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("chip", slices.CHIPS)
def test_the_tpu_compiler_knows_every_flag(chip):
    ran = compiled(chip, "2x2" if chip in ("v5e", "v6e") else "2x2x1", xla_flags.line(chip))
    assert ran.stdout.strip() == "compiled", ran.stderr[-2000:]


def test_the_tpu_compiler_refuses_a_flag_that_does_not_exist():
    ran = compiled("v5e", "2x2", "--xla_tpu_no_such_flag=true")
    assert ran.returncode != 0 and "xla_tpu_no_such_flag" in ran.stderr


@pytest.mark.parametrize("flags, known", [(xla_flags.line("h100"), True), ("--xla_gpu_no_such_flag=true", False)])
def test_xla_knows_every_gpu_flag_and_refuses_others(flags, known):
    variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=variables, capture_output=True)
    assert (ran.returncode == 0) == known, ran.stderr
    assert {xla_flags.line(chip) for chip in xla_flags.GPUS} == {xla_flags.line("h100")}  # so that this covers all


@pytest.mark.parametrize("module", ["gke", "queued", "slurm", "xla_flags"])
def test_each_generator_prints_its_text_from_the_command_line(root, module):
    arguments = {
        "gke": ["--slice=v6e:4x4", "--image=i", "--", "true"],
        "queued": ["--slice=v6e:4x4", "--project=p", "--zone=z", "--repository=r", "--", "true"],
        "slurm": ["--gpu=b200", "--", "true"],
        "xla_flags": ["--chip=b200"],
    }[module]
    line = [sys.executable, "-m", f"launch.{module}", *arguments]
    ran = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "xla" in ran.stdout, ran.stderr
