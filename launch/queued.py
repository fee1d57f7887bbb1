"""A script for TPU slices as queued resources: asks for the slice, waits, and starts the command on all its hosts.

    python -m launch.queued --slice=v6e:4x4 --name=nano --project=P --zone=Z --repository=https://.../llama4_jax.git \
        -- python -m experiments.pretrain_nano --cluster --folder=/gcs/nano > nano.sh && bash nano.sh

Spot slices may be taken away: the processes then get SIGTERM and save, and running the script again resumes.
Source: Google Cloud, "Manage queued resources".
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from absl import app, flags

from launch import asked, slices, xla_flags
from launch.slices import Slice

PROJECT = flags.DEFINE_string("project", None, "Google Cloud project", required=True)
ZONE = flags.DEFINE_string("zone", None, "zone that has such slices", required=True)
REPOSITORY = flags.DEFINE_string("repository", None, "git repository of this project", required=True)
SPOT = flags.DEFINE_bool("spot", False, "cheaper, and may be taken away")


def script(where: Slice, name: str, place: tuple[str, str], repository: str, command: Sequence[str], spot: bool) -> str:
    """A bash script; place: (project, zone). Raises ValueError without a
    command, NotImplementedError for a chip whose software version is not known."""
    if where.kind.runtime is None:
        raise NotImplementedError(
            f"which software queued {where.chip} resources want is not known here; use launch.gke"
        )
    project, zone = place
    at = f"--project={shlex.quote(project)} --zone={shlex.quote(zone)}"
    remote = (
        f"test -d run || git clone {shlex.quote(repository)} run; cd run; "
        "test -d .venv || { python3.11 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]'; }; "
        f"export LIBTPU_INIT_ARGS={shlex.quote(xla_flags.line(where.chip))} PATH=$PWD/.venv/bin:$PATH; "
        f"exec {shlex.join(asked.command(command))}"
    )
    return f"""\
#!/usr/bin/env bash
# {where.chips} chips on {where.hosts} hosts, {where.chip} {where.topology}. Safe to run again: it asks only for what is not there.
set -euo pipefail
name={shlex.quote(name)}

state() {{ gcloud compute tpus queued-resources describe "$name" {at} --format='value(state.state)' 2>/dev/null || true; }}

if [[ -z "$(state)" ]]; then
  gcloud compute tpus queued-resources create "$name" {at} --node-id="$name" \\
    --accelerator-type={where.accelerator_type} --runtime-version={where.kind.runtime}{" --spot" if spot else ""}
fi
until [[ "$(state)" == ACTIVE ]]; do
  case "$(state)" in
    FAILED | SUSPENDED) echo "$name is $(state); delete it with: gcloud compute tpus queued-resources delete $name {at} --force" >&2; exit 1 ;;
  esac
  sleep 30
done
gcloud compute tpus tpu-vm ssh "$name" {at} --worker=all --command={shlex.quote(remote)}
"""


def main(arguments: Sequence[str]) -> None:
    place = (PROJECT.value, ZONE.value)
    print(
        script(slices.parse(asked.SLICE.value), asked.NAME.value, place, REPOSITORY.value, arguments[1:], SPOT.value),
        end="",
    )


if __name__ == "__main__":
    app.run(main)
