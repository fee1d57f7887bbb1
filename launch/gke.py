"""A JobSet for TPU slices under GKE, with Kueue's queue, restarts and time to save; and the equal xpk command.

    python -m launch.gke --slice=v5p:4x4x8 --name=scout --image=REGION-docker.pkg.dev/PROJECT/llama4/train --claim=CLAIM \
        -- python -m experiments.pretrain_scout --cluster --data=/data/text --tokenizer=/data/tokenizer.model --output=/data/scout \
        > scout.yaml
    kubectl apply -f scout.yaml

One pod a host, all of a slice or none; all see the file system of --claim at /data. A pod that dies takes its JobSet down,
which starts again and resumes from the last checkpoint; a pod that is evicted gets SIGTERM, and the grace period to save in.
--xpk=CLUSTER prints the command of xpk instead, which mounts what `xpk storage attach` was told of.
What recipes need of a chip and a step's estimated time stand in experiments.pretrain_scout and experiments.pretrain_maverick.
Source: the JobSet API (jobset.x-k8s.io/v1alpha2), "Run TPU workloads with Kueue and JobSet" (Google Cloud).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence

from absl import app, flags

from launch import asked, slices, xla_flags
from launch.slices import Slice

SLICES = flags.DEFINE_integer("slices", 1, "slices that train one model together", lower_bound=1)
IMAGE = flags.DEFINE_string("image", None, "container image with this project in it", required=True)
CLAIM = flags.DEFINE_string("claim", None, "PersistentVolumeClaim, ReadWriteMany, of the files that all hosts share")
QUEUE = flags.DEFINE_string("queue", "default", "Kueue's LocalQueue")
RESTARTS = flags.DEFINE_integer("restarts", 10, "times the JobSet may start again", lower_bound=0)
XPK = flags.DEFINE_string("xpk", None, "name of an xpk cluster: print the xpk command for it instead of the manifest")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to run where. Raises ValueError for a name that Kubernetes would refuse, and without a command."""

    name: str
    image: str
    command: tuple[str, ...]
    slice: Slice
    slices: int = 1
    queue: str = "default"
    restarts: int = 10
    grace: int = 120
    claim: str | None = None

    def __post_init__(self):
        # Names of pods add a slice, a host and a random tail to it, and have at most 63 letters.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"name {self.name!r}: use at most 40 lower-case letters, digits and dashes, a letter first"
            )
        if not self.command:
            raise ValueError(
                "wanted a command after `--`, such as python -m experiments.pretrain_nano --cluster; got none"
            )


def manifest(job: Job) -> str:
    """The JobSet as YAML; as every JSON text is YAML, strings are quoted as JSON does."""
    quote, kind = json.dumps, job.slice.kind
    arguments = "\n".join(f"                    - {quote(word)}" for word in job.command)
    mounts, volumes = _shared_files(job.claim)
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job.name}
  labels:
    kueue.x-k8s.io/queue-name: {quote(job.queue)}
  annotations:
    # A slice is a node pool of its own: all pods of a job go there together, and no other's.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {job.restarts}
  replicatedJobs:
    - name: slice
      replicas: {job.slices}
      template:
        spec:
          parallelism: {job.slice.hosts}
          completions: {job.slice.hosts}
          completionMode: Indexed
          # Hosts of one slice stop and start together: the JobSet restarts, not a pod.
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {job.grace}
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {kind.gke}
                cloud.google.com/gke-tpu-topology: {quote(job.slice.topology)}
              containers:
                - name: train
                  image: {quote(job.image)}
                  command:
{arguments}
                  env:
                    - name: LIBTPU_INIT_ARGS
                      value: {quote(xla_flags.line(job.slice.chip))}
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    requests:
                      google.com/tpu: {job.slice.chips_per_host}
                    limits:
                      google.com/tpu: {job.slice.chips_per_host}
{mounts}{volumes}"""


def _shared_files(claim: str | None) -> tuple[str, str]:
    """Of the container and of the pod; nothing without a claim."""
    if claim is None:
        return "", ""
    mounts = """\
                  volumeMounts:
                    - name: shared
                      mountPath: /data
"""
    volumes = f"""\
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: {json.dumps(claim)}
"""
    return mounts, volumes


def xpk(job: Job, cluster: str) -> str:
    """The `xpk workload create` that asks for the same."""
    command = f"export LIBTPU_INIT_ARGS={shlex.quote(xla_flags.line(job.slice.chip))}; {shlex.join(job.command)}"
    words = [
        "xpk",
        "workload",
        "create",
        f"--cluster={cluster}",
        f"--workload={job.name}",
        f"--docker-image={job.image}",
    ]
    words += [f"--tpu-type={job.slice.accelerator_type}", f"--num-slices={job.slices}"]
    words += [f"--max-restarts={job.restarts}", f"--termination-grace-period-seconds={job.grace}"]
    return shlex.join([*words, f"--command={command}"])


def main(arguments: Sequence[str]) -> None:
    where = (slices.parse(asked.SLICE.value), SLICES.value)
    how = {"queue": QUEUE.value, "restarts": RESTARTS.value, "grace": asked.GRACE.value, "claim": CLAIM.value}
    job = Job(asked.NAME.value, IMAGE.value, tuple(arguments[1:]), *where, **how)
    print(xpk(job, XPK.value) + "\n" if XPK.value else manifest(job), end="")


if __name__ == "__main__":
    app.run(main)
