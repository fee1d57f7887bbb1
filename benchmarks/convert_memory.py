"""Memory and speed of converting checkpoints: a random one of Scout's widths, in every direction, against a plain copy.

    python -m benchmarks.convert_memory --folder DIR [--layers 1] [--vision_layers 2] [--set text.vocab_size=32768]
                                        [--few_bits] [--json PATH]

The checkpoint (8.6 GB in bfloat16 with one decoder layer) and all that is made of it lie in a new folder inside
--folder, which needs four times its size free, and are deleted at the end. Each direction is `experiments.convert` in a
process of its own, from the start of Python to the checked target; its peak is the kernel's count of resident memory.
A plain copy reads and writes the same files in the same run. Where a direction leads back to the first layout, the
files are compared byte by byte. --set makes it smaller: fewer tokens and experts leave less to do. Target: the peak is below the largest tensor and LIMIT; `others` says how busy other
programs kept the machine, which memory does not care about and seconds do. --few_bits measures rounding alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import machine

LIMIT = 1.5e9  # bytes above the largest tensor
BUFFER = 1 << 24
PACKED = "packed"  # the folder of what is rounded to few bits, from which nothing leads back
# What is read, what is written, from which folder to which, and the recipe of few bits.
STEPS = (
    ("hf", "orbax", "hf", "orbax", None),
    ("orbax", "hf", "orbax", "again", None),
    ("hf", "hf_unfused", "hf", "separate", None),
    ("hf_unfused", "hf", "separate", "again", None),
    ("hf", "meta", "hf", "meta", None),
    ("meta", "hf", "meta", "again", None),
    ("hf", "hf_unfused", "hf", PACKED, "int4_experts"),
    ("hf", "orbax", "hf", PACKED, "int4_all"),
)


def make(folder: pathlib.Path, layers: int, vision_layers: int, seed: int, changes: Sequence[str] = ()) -> None:
    """Writes a Hugging Face checkpoint of Scout's widths with random bits."""
    import dataclasses
    import zlib

    import jax.numpy as jnp
    import numpy as np

    from llama4_jax import config as configs
    from llama4_jax.checkpoint import hf, leaves, targets
    from llama4_jax.config import presets

    scout = presets.scout()
    text = dataclasses.replace(scout.text, num_layers=layers)
    vision = dataclasses.replace(scout.vision, num_layers=vision_layers)
    scout = configs.apply(dataclasses.replace(scout, text=text, vision=vision), changes)

    class Random:
        config, held = scout, {}
        specs = {
            path: (shape, jnp.dtype("bfloat16"))
            for path, shape in leaves.parameter_shapes(config, stacked=False).items()
        }

        def window(self, path, box):
            rng = np.random.default_rng([seed, zlib.crc32(f"{path} {box}".encode())])
            shape = [part.stop - part.start for part in box]
            bits = rng.integers(0, 2**64, -(-int(np.prod(shape)) // 4), np.uint64).view(np.uint16)
            return bits[: int(np.prod(shape))].reshape(shape).view(jnp.bfloat16)

        def axis(self, path):
            return 0

    folder.mkdir()
    target = targets.make("hf", Random(), hf.SHARD_BYTES, None)
    target.prepare(folder)
    target.finish(folder, {unit: target.write(folder, unit) for unit in target.units})
    largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in Random.specs.values())
    print(json.dumps({"bytes": sum(target.units.values()), "largest": largest}))


def timed(command: list[str]) -> dict[str, float]:
    """Runs a command; its seconds, its peak of resident memory, and the share of the cores that others used.

    This process must be small: the kernel counts what it has as its child's, until the child becomes another program.
    """
    before = machine.snapshot()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    after = machine.snapshot()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; see above")
    seconds = after.wall - before.wall
    others = machine.foreign_share(before, after) - (used.ru_utime + used.ru_stime) / (seconds * os.cpu_count())
    os.sync()  # what is still to be written is not the next one's burden
    return {"seconds": seconds, "peak": used.ru_maxrss * 1024, "others": max(0.0, others)}


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Copies a folder's files through a buffer; returns the seconds."""
    target.mkdir()
    start = time.monotonic()
    for path in source.iterdir():
        with open(path, "rb") as read, open(target / path.name, "wb") as written:
            shutil.copyfileobj(read, written, BUFFER)
    seconds = time.monotonic() - start
    os.sync()
    shutil.rmtree(target)
    return seconds


def same_files(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two folders hold files of weights of the same names and bytes.

    (config.json may differ: one layer does not tell how often layers without rotary positions come.)
    """
    names = [sorted(path.name for path in folder.glob("*.safetensors*")) for folder in (one, other)]
    return names[0] == names[1] and all(_same_bytes(one / name, other / name) for name in names[0])


def _same_bytes(one: pathlib.Path, other: pathlib.Path) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        while block := first.read(BUFFER):
            if block != second.read(BUFFER):
                return False
        return not second.read(1)


def measure(folder: pathlib.Path, size: int, steps: Sequence[tuple]) -> list[dict]:
    """A record for each of `steps`."""
    records = []
    for read, write, source, target, recipe in steps:
        direction = f"{read} to {write}" + (f", {recipe}" if recipe else "")
        print(direction, file=sys.stderr)
        copying = copy(folder / source, folder / "copy") if source == "hf" else records[-1]["copy_seconds"]
        command = [sys.executable, "-m", "experiments.convert", f"--from={read}", f"--to={write}"]
        command += [f"--quant={recipe}"] if recipe else []
        found = timed([*command, f"--source={folder / source}", f"--target={folder / target}"])
        same = same_files(folder / "hf", folder / target) if target == "again" else None
        rates = {"rate": size / found["seconds"], "copy_rate": size / copying}
        records.append({"direction": direction, **found, **rates, "copy_seconds": copying, "same": same})
        if target == "again":
            shutil.rmtree(folder / source)
        if target in ("again", PACKED):
            shutil.rmtree(folder / target)
    return records


def table(records: list[dict], largest: int) -> str:
    """The records as lines that line up."""
    names = ("direction", "seconds", "GB/s", "copy GB/s", "ratio", "peak GB", "over largest GB", "others", "same bits")
    lines = ["{:<28} {:>8} {:>6} {:>10} {:>6} {:>8} {:>16} {:>7} {:>10}".format(*names)]
    for each in records:
        sizes = (each["rate"] / 1e9, each["copy_rate"] / 1e9, each["rate"] / each["copy_rate"])
        same = {None: "-", True: "yes", False: "NO"}[each["same"]]
        lines.append(
            "{:<28} {:8.1f} {:6.2f} {:10.2f} {:6.2f} {:8.2f} {:16.2f} {:7.0%} {:>10}".format(
                each["direction"],
                each["seconds"],
                *sizes,
                each["peak"] / 1e9,
                (each["peak"] - largest) / 1e9,
                each["others"],
                same,
            )
        )
    return "\n".join(lines)


def verdict(records: list[dict], largest: int) -> bool:
    """Whether every peak is below the largest tensor and LIMIT, and every way back gave the same bits."""
    return all(each["peak"] < largest + LIMIT and each["same"] is not False for each in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where to make and delete the checkpoints")
    parser.add_argument("--layers", type=int, default=1, help="decoder layers")
    parser.add_argument("--vision_layers", type=int, default=2, help="layers of the vision tower")
    parser.add_argument("--set", action="append", default=[], help="model override, as text.moe.num_experts=4")
    parser.add_argument("--seed", type=int, default=0, help="of the random bits")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    parser.add_argument("--few_bits", action="store_true", help="only the directions that round to few bits")
    arguments = parser.parse_args()
    steps = [step for step in STEPS if step[-1] or not arguments.few_bits]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = pathlib.Path(scratch)
        # In another process: what this one has in memory would count as its children's.
        code = (
            f"from benchmarks import convert_memory as c; import pathlib; c.make(pathlib.Path({str(folder / 'hf')!r}), "
        )
        code += f"{arguments.layers}, {arguments.vision_layers}, {arguments.seed}, {arguments.set})"
        made = json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)
        records = measure(folder, made["bytes"], steps)
    print(f"{made['bytes'] / 1e9:.2f} GB, largest tensor {made['largest'] / 1e9:.2f} GB")
    print(table(records, made["largest"]))
    met = verdict(records, made["largest"])
    print(
        f"peak below the largest tensor and {LIMIT / 1e9} GB, same bits on the way back: {'met' if met else 'MISSED'}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({**made, "records": records, "met": met}, indent=1) + "\n")


if __name__ == "__main__":
    main()
