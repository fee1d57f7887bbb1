"""The whole preparation: sources in, shards and a manifest out; the same bytes for any number of workers and kills.

1. annotate: workers take parts, runs of files of about 2 MB, and write each one's records and numbers to work/.
2. decide: one process goes through all documents in order and says which stay.
3. write: workers copy the records that stay, shuffled by the seed, to shards; then come removed.jsonl and the manifest.

Every file is written under a temporary name and entered in the ledger when it is whole. A run that finds a ledger does
what is missing; one that finds nothing missing only reads its manifest.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from llama4_jax.data.draws import Draw, generator
from llama4_jax.data.preparation import corpus, decontaminate, read, shards, summary, words, workers
from llama4_jax.data.preparation.decide import Decision, decide
from llama4_jax.data.preparation.language import Profiles
from llama4_jax.data.preparation.ledger import Ledger, write
from llama4_jax.data.preparation.settings import Settings

FORMAT = 1  # of the records and the manifest; a new one makes old ledgers useless
REMOVED = "removed.jsonl"
WORK = "work"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished preparation: its manifest, and processor seconds by stage of what this run did of it."""

    manifest: dict
    seconds: Mapping[str, float]
    megabytes: float  # of source documents annotated by this run
    wall: float  # seconds


@dataclasses.dataclass(frozen=True, eq=False)
class _Shared:
    """What every worker knows."""

    folder: pathlib.Path
    settings: Settings
    licences: Mapping[str, str]
    forbidden: decontaminate.Forbidden
    profiles: Profiles | None
    num_workers: int

    @functools.cached_property
    def annotator(self):
        # Here and no sooner: TensorFlow costs 5 s and 760 MB, and a process that only hands out jobs needs none of it.
        from llama4_jax.data.preparation import annotate, normalise

        if self.num_workers > 1:
            normalise.one_thread()
        return annotate.Annotator(self.settings, self.licences, self.forbidden, self.profiles)


def run(
    sources: Sequence[corpus.Source],
    evaluation: Mapping[str, Mapping[str, str]],
    settings: Settings,
    folder: str | pathlib.Path,
    *,
    profiles: Profiles | None = None,
    num_workers: int = 1,
    keep_work: bool = False,
) -> Prepared:
    """Prepares `sources` in `folder`, or goes on with that.

    evaluation: items by name, of each set by name. keep_work: leaves the annotated parts, removed documents included.
    Raises ValueError for a folder with another preparation in it.
    """
    start = time.perf_counter()
    items = [item for source in sources for item in source.items]
    if not items or len({source.name for source in sources}) < len(sources):
        names = [source.name for source in sources]
        raise ValueError(f"wanted documents, and sources of different names, got {len(items)} documents of {names}")
    ledger = Ledger(folder, _fingerprint(items, evaluation, settings, profiles))
    if not _finished(ledger):
        every = {f"{name}/{item}": text for name, texts in evaluation.items() for item, text in texts.items()}
        forbidden = decontaminate.forbid(every, settings.overlap)
        licences = {source.name: source.licence for source in sources}
        shared = _Shared(ledger.folder, settings, licences, forbidden, profiles, num_workers)
        seconds, megabytes = _prepare(items, shared, ledger, evaluation)
    else:
        seconds, megabytes = {}, 0.0
    if not keep_work:
        shutil.rmtree(ledger.folder / WORK, ignore_errors=True)
    return Prepared(read.manifest(folder), seconds, megabytes, time.perf_counter() - start)


def _finished(ledger: Ledger) -> bool:
    names = [read.MANIFEST, REMOVED]
    if not all(map(ledger.has, names)):
        return False
    return all(ledger.has(shard["file"]) for shard in read.manifest(ledger.folder)["shards"])


def _prepare(items, shared: _Shared, ledger: Ledger, evaluation):
    """Does what is missing; (seconds by stage, megabytes annotated)."""
    (ledger.folder / WORK).mkdir(exist_ok=True)
    parts = list(_parts(items, shared.settings.part_bytes))
    with workers.pool(shared.num_workers, shared) as run_jobs:
        seconds, megabytes = _annotate(parts, ledger, run_jobs)
        begin = time.process_time()
        arrays = load(ledger.folder)
        decision = decide(arrays, words_of(ledger.folder, shared.settings), shared.forbidden, shared.settings)
        seconds["decide"] = time.process_time() - begin
        begin = time.perf_counter()
        files = _write(arrays, decision, shared, ledger, run_jobs)
        seconds["write"] = time.perf_counter() - begin
    manifest = {
        "format": FORMAT,
        "settings": dataclasses.asdict(shared.settings),
        "versions": _versions(),
        "sources": summary.of_sources(items, arrays, decision, shared.licences, _language_names(shared.profiles)),
        "duplicates": summary.of_duplicates(decision),
        "evaluation": summary.of_evaluation(evaluation, decision, shared.forbidden),
        "shards": files,
    }
    removed = summary.removed(items, decision, shared.forbidden)
    for name, content in ((REMOVED, removed), (read.MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))):
        write(ledger.folder / name, content.encode())
        ledger.add(name)
    return seconds, megabytes


def _parts(items: Sequence[corpus.Item], limit: int) -> Iterator[tuple[int, list[corpus.Item]]]:
    """(Number, documents) of runs of about `limit` bytes."""
    part: list[corpus.Item] = []
    number = size = 0
    for item in items:
        if part and size + item.size > limit:
            yield number, part
            number, part, size = number + 1, [], 0
        part.append(item)
        size += item.size
    yield number, part


def _annotate(parts, ledger: Ledger, run_jobs: workers.Run) -> tuple[dict[str, float], float]:
    missing = [part for part in parts if not all(map(ledger.has, _names(part[0])))]
    seconds: collections.Counter = collections.Counter()
    megabytes = 0.0
    with tqdm(total=len(parts), initial=len(parts) - len(missing), unit="part", desc="annotate") as bar:
        for (number, _), (taken, size) in run_jobs(_annotate_part, missing):
            for name in _names(number):
                ledger.add(name)
            seconds.update(taken)
            megabytes += size / 1e6
            bar.update()
    return dict(seconds), megabytes


def _names(number: int) -> tuple[str, str]:
    """The files of a part: records, and numbers."""
    return f"{WORK}/part-{number:05d}.arrayrecord", f"{WORK}/part-{number:05d}.npz"


def _annotate_part(shared: _Shared, job: tuple[int, list[corpus.Item]]) -> tuple[dict[str, float], int]:
    number, items = job
    part = shared.annotator.part(items)
    records, numbers = (shared.folder / name for name in _names(number))
    shards.write(records, part.records)
    temporary = numbers.with_suffix(".tmp.npz")
    np.savez(temporary, **part.arrays)
    temporary.replace(numbers)
    return part.seconds, int(part.arrays["source_bytes"].sum())


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The numbers of all parts as one table (see `annotate`), and `part` int32 [n], where each document's record is."""
    parts = []
    rows = 0
    for number, path in enumerate(sorted((folder / WORK).glob("part-*[0-9].npz"))):
        with np.load(path) as file:
            part = dict(file)
        part["hits"][:, 0] += rows
        part["part"] = np.full(len(part["reason"]), number, np.int32)
        rows += len(part["reason"])
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def texts(folder: pathlib.Path):
    """A function from a document's number to its text; of documents that passed the rule of quality, from work/."""
    arrays = load(folder)

    def text(document: int) -> str:
        path = folder / _names(int(arrays["part"][document]))[0]
        return read.record(path, int(arrays["record"][document]))["text"]

    return text


def words_of(folder: pathlib.Path, settings: Settings):
    """A function from a document's number to its word n-grams."""
    text = texts(folder)
    return lambda document: words.shingles(words.hashes(text(document)), settings.likeness.shingle_words)


def _write(arrays, decision: Decision, shared: _Shared, ledger: Ledger, run_jobs: workers.Run) -> list[dict]:
    """Writes the shards that are missing; says of all of them what the manifest does."""
    kept = np.flatnonzero(decision.is_a("kept"))
    kept = generator(shared.settings.seed, Draw.ORDER, 0).permutation(kept)
    runs = shards.cut(arrays["text_bytes"][kept], shared.settings.shard_bytes)
    names = [f"text-{number:05d}-of-{len(runs):05d}.arrayrecord" for number in range(len(runs))]
    places = [np.stack([arrays["part"], arrays["record"]], -1)[kept[run]] for run in runs]
    missing = [job for job in zip(names, places) if not ledger.has(job[0])]
    for (name, _), _ in tqdm(run_jobs(_write_shard, missing), total=len(missing), unit="shard", desc="write"):
        ledger.add(name)
    return [
        ledger[name] | {"documents": len(kept[run]), "text_bytes": int(arrays["text_bytes"][kept[run]].sum())}
        for name, run in zip(names, runs)
    ]


def _write_shard(shared: _Shared, job: tuple[str, np.ndarray]) -> None:
    """Copies records, at (part, row) of each, in that order."""
    name, places = job
    records: list[bytes] = [b""] * len(places)
    for number in np.unique(places[:, 0]):
        here = np.flatnonzero(places[:, 0] == number)
        found = shards.read(shared.folder / _names(int(number))[0], places[here, 1].tolist())
        for place, record in zip(here, found):
            records[place] = record
    shards.write(shared.folder / name, records)


def _language_names(profiles: Profiles | None) -> tuple[str, ...]:
    return profiles.names if profiles else ()


def _versions() -> dict[str, str]:
    """What could change the text: of the operations on it and of Unicode."""
    return {"tensorflow-text": importlib.metadata.version("tensorflow-text"), "unicode": unicodedata.unidata_version}


def _fingerprint(items, evaluation, settings: Settings, profiles: Profiles | None) -> str:
    """Equal for preparations that write the same bytes; a source file counts by its size and time of change."""
    digest = hashlib.sha256(repr((FORMAT, settings, sorted(_versions().items()))).encode())
    for item in items:
        changed = os.stat(item.path).st_mtime_ns if item.form is not corpus.Form.TOPIC else 0
        digest.update(repr((*item, changed)).encode())
    digest.update(json.dumps(evaluation, sort_keys=True).encode())
    if profiles:
        digest.update(repr(profiles.names).encode() + profiles.log_probability.tobytes())
    return digest.hexdigest()[:16]
