"""Answers of the compiler are kept: a program is compiled once, another program or topology is another question."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from llama4_jax.plan.compiler import Answer

# As many devices as the compiler must say of these names, none of which need exist here.
TOPOLOGIES = {"v5e:16x16": 256, "v6e:16x16": 256, "v5p:4x8x8": 256, "tpu7x:4x8x8": 512}


def facts(folder: pathlib.Path) -> dict:
    """What asking for small programs over and over gives; in a process that may start libtpu."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llama4_jax.plan import topology
    from llama4_jax.plan.compiler import Answers

    mesh = Mesh(topology.devices("v5e:2x2"), "x")

    def lowered(rows: int):
        """Adds one to a matrix in place, for four devices."""
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        shape = jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=sharding)
        return jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=sharding).lower(shape)

    answers = Answers(folder=folder)
    asked = {
        "first": answers.ask(lowered(4096), "v5e:2x2"),
        "again": answers.ask(lowered(4096), "v5e:2x2"),
        "larger": answers.ask(lowered(8192), "v5e:2x2"),
        "fresh": Answers(folder=folder, fresh=True).ask(lowered(4096), "v5e:2x2"),
        "flags": Answers(folder=folder, flags="--xla_other").ask(lowered(4096), "v5e:2x2"),
        "nowhere": Answers().ask(lowered(4096), "v5e:2x2"),
        "too_large": answers.ask(lowered(2**24), "v5e:2x2"),
        "too_large_again": answers.ask(lowered(2**24), "v5e:2x2"),
    }
    asked = {name: dataclasses.asdict(answer) | {"text": len(answer.text)} for name, answer in asked.items()}
    sizes = {name: (len(topology.devices(name)), topology.size(name)) for name in TOPOLOGIES}
    return {"asked": asked, "sizes": sizes, "files": sorted(path.name for path in folder.iterdir())}


def test_an_accepted_program_fits_though_its_bound_is_above_the_memory():
    """The bound adds what lies on the device before and after something went to the host."""
    taken = {"compile_seconds": 1.0, "host_gib": 1.0}
    assert Answer(**taken, peak=33, on_host=5).excess(32) == 0
    assert Answer(**taken, peak=33).excess(32) == 1
    assert Answer(**taken, peak=31).excess(32) == 0


def test_a_program_is_compiled_once_and_another_question_anew(root, tmp_path):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment.pop("XLA_FLAGS", None)
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, __file__, str(tmp_path / "answers")]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    asked = found["asked"]
    assert {name for name, answer in asked.items() if answer["recalled"]} == {"again", "too_large_again"}
    assert asked["again"] == asked["first"] | {"recalled": True}
    assert asked["first"]["in_place"] == 4096 * 1024 * 4 // 4 and asked["first"]["text"] > 0
    assert asked["larger"]["in_place"] == 2 * asked["first"]["in_place"]
    # A quarter of 64 GiB fills a chip of 16 GiB, of which the compiler keeps some for itself.
    assert 0 < asked["too_large"]["over"] < 1 and asked["too_large_again"]["over"] == asked["too_large"]["over"]
    # One file each for first (and fresh, which replaces it), larger, flags and too_large; nothing half written.
    assert len(found["files"]) == 4 and all(name.endswith(".json.gz") for name in found["files"])
    assert {name: tuple(sizes) for name, sizes in found["sizes"].items()} == {
        name: (size, size) for name, size in TOPOLOGIES.items()
    }


if __name__ == "__main__":
    print(json.dumps(facts(pathlib.Path(sys.argv[1]))))
