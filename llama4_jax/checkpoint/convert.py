"""Checkpoints from one layout to another, a tensor at a time: resumable, checked, and whole or not at all.

The target comes about in `TARGET.partial` beside it, with a ledger of what is finished. A conversion that was killed
goes on where it was when the same is asked for again. At the end all is read back and compared with the checksums of
what was written, and the folder is renamed. Neither a checkpoint nor its largest tensor is ever in memory whole, but for
the parameter that a transform is given. With a recipe, weights are rounded to few bits on the way (`quantising`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from llama4_jax.checkpoint import hf, layouts, meta, native, quantised, targets
from llama4_jax.checkpoint.leaves import FileLeaves, Leaves
from llama4_jax.checkpoint.ledger import NAME, Ledger
from llama4_jax.checkpoint.quantising import Quantising
from llama4_jax.config.quant import QuantRecipe

READ = ("hf", "hf_unfused", "meta", "orbax")  # "hf" and "meta" see from the names which of their layouts it is
WRITTEN = ("hf", "hf_unfused", "meta", "orbax")  # "meta" are the names of Meta's modules
MARKS = ("config.json", meta.PARAMS, native.MANIFEST)  # a folder with one of these is a checkpoint
# Small files that belong to a model in any layout, copied along.
KEPT = ("tokenizer*", "special_tokens_map.json", "chat_template*", "*processor_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what."""

    source: pathlib.Path
    target: pathlib.Path
    read: str  # one of READ
    write: str  # one of WRITTEN
    dtype: str | None = None  # of the weights: "float32", "bfloat16", "float16"; None: as stored
    max_shard_bytes: int = hf.SHARD_BYTES  # of one safetensors file in Hugging Face's layouts
    overwrite: bool = False  # replace a checkpoint that is at `target`
    recipe: QuantRecipe | None = None  # which weights go to few bits, for "orbax" or "hf_unfused"
    method: str = "rtn"  # how: "rtn" or "clip", see `quantising.Quantising`
    keep_quantised: bool = False  # weights that are quantised in the source stay so; those of "orbax" do anyway
    transform: targets.Transform | None = None  # of each whole parameter on its way to "orbax", as to fewer bits

    def __post_init__(self):
        for name, known in (("read", READ), ("write", WRITTEN)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; wanted one of {', '.join(known)}")
        if self.recipe is not None and self.transform is not None:
            raise ValueError("a recipe and a transform: wanted one of them, since both decide what is stored")
        source, target = self.source.resolve(), self.target.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise ValueError(f"source {source} and target {target} are one in the other; choose another target")

    @property
    def partial(self) -> pathlib.Path:
        """Where the target comes about."""
        return self.target.with_name(self.target.name + ".partial")

    def work(self) -> dict[str, Any]:
        """What must be the same for one process to go on with what another began."""
        files = {
            str(path.relative_to(self.source)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(self.source.rglob("*"))
            if path.is_file()
        }
        how = self.transform and f"{self.transform.__module__}.{self.transform.__qualname__}"
        return {
            "source": str(self.source.resolve()),
            "files (size and time of change)": files,
            "read": self.read,
            "write": self.write,
            "dtype": self.dtype,
            "max_shard_bytes": self.max_shard_bytes,
            "transform": how,
            "recipe": self.recipe and dataclasses.asdict(self.recipe),
            "method": self.method,
            "keep_quantised": self.keep_quantised,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a conversion is: every byte is written and then read back."""

    phase: str  # "writing" or "checking"
    unit: str  # the tensor just finished
    done: int  # bytes, of both phases
    total: int


Advance = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    tensors: int  # of the target: files' tensors, or parameters
    resumed: int  # of those, how many were finished already
    bytes: int  # of all of them


def convert(conversion: Conversion, advance: Advance = lambda _: None) -> Summary:
    """Carries out `conversion`, or finishes what an earlier process began of it.

    `advance` is called after each tensor, written or checked.
    Raises, with nothing at the target and nothing half-written: FileExistsError if something is there; ValueError
    listing all that the source lacks, has too much or has in another shape; NotImplementedError for what a format
    cannot express. Raises ValueError also where the ledger belongs to other work, and where what was written is not what
    is on disk: those tensors are forgotten, and the next run makes them again.
    """
    _check_free(conversion)
    read, folder, dtype = conversion.read, conversion.source, conversion.dtype
    with opened(read, folder, dtype, keep_quantised=conversion.keep_quantised) as source:
        if conversion.recipe is not None:
            source = Quantising(source, conversion.recipe, conversion.method)
        target = targets.make(conversion.write, source, conversion.max_shard_bytes, conversion.transform)
        with Ledger(conversion.partial, conversion.work()) as ledger:
            resumed = len(ledger.done)
            _write_missing(target, conversion.partial, ledger, advance)
            _verify(target, conversion.partial, ledger, advance)
            target.finish(conversion.partial, ledger.done)
            _copy_kept(conversion)
            _move_into_place(conversion)
    return Summary(tensors=len(target.units), resumed=resumed, bytes=sum(target.units.values()))


@contextlib.contextmanager
def opened(
    kind: str, folder: pathlib.Path, dtype: str | None = None, *, keep_quantised: bool = False
) -> Iterator[Leaves]:
    """The parameters of the checkpoint of `kind` (one of READ) in `folder`, layer by layer."""
    if kind == "orbax":
        yield native.NativeLeaves(folder, dtype)
        return
    asked = meta.opened(folder) if kind == "meta" else hf.opened(folder, keep_quantised=keep_quantised)
    with asked as (config, layout, readers):
        if kind == "hf_unfused" and layout != layouts.HF_UNFUSED:
            raise ValueError(f"{folder} is in the layout {layout.name!r}; read it as 'hf'")
        yield FileLeaves(
            config,
            layout,
            readers,
            dtype=dtype,
            stacked=False,
            source=f"checkpoint {folder}",
            quantised=quantised.specs(readers),
        )


def _write_missing(target: targets.Target, folder: pathlib.Path, ledger: Ledger, advance: Advance) -> None:
    """Writes every unit that the ledger does not have."""
    target.prepare(folder)
    done, total = 0, 2 * sum(target.units.values())
    for unit, size in target.units.items():
        if unit not in ledger.done:
            ledger.add(unit, target.write(folder, unit))
        done += size
        advance(Progress(phase="writing", unit=unit, done=done, total=total))


def _verify(target: targets.Target, folder: pathlib.Path, ledger: Ledger, advance: Advance) -> None:
    """Compares what is on disk with what was written."""
    damaged = []
    done = sum(target.units.values())
    for unit, size in target.units.items():
        try:
            whole = target.stored(folder, unit) == ledger.done[unit]
        except (OSError, ValueError):
            whole = False
        damaged += [] if whole else [unit]
        done += size
        advance(Progress(phase="checking", unit=unit, done=done, total=2 * sum(target.units.values())))
    if damaged:
        ledger.drop(damaged)
        raise ValueError(
            f"{folder}: on disk {len(damaged)} of {len(target.units)} tensors are not what was written:\n  "
            + "\n  ".join(damaged)
            + "\nCheck the disk, then run the same again: these alone are made anew."
        )


def _check_free(conversion: Conversion) -> None:
    """Raises FileExistsError where the target must not be written."""
    target = conversion.target
    if not target.exists():
        return
    if not conversion.overwrite:
        raise FileExistsError(f"{target} exists; choose another target, or say to overwrite it")
    if not any((target / name).is_file() for name in MARKS):
        raise FileExistsError(f"{target} has none of {', '.join(MARKS)}: it is no checkpoint, and is not overwritten")


def _copy_kept(conversion: Conversion) -> None:
    for pattern in KEPT:
        for path in sorted(conversion.source.glob(pattern)):
            if path.is_file():
                shutil.copy2(path, conversion.partial / path.name)


def _move_into_place(conversion: Conversion) -> None:
    """The one moment at which the target changes."""
    target = conversion.target
    old = target.with_name(target.name + ".replaced")
    if target.exists():
        os.rename(target, old)
    os.rename(conversion.partial, target)
    (target / NAME).unlink()
    if old.exists():
        shutil.rmtree(old)
