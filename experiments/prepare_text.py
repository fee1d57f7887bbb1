"""Prepare text for pre-training: repair, filter, deduplicate, decontaminate, and write shards with a manifest.

Claim:     with --plant: every planted duplicate and leak is found, and no document is removed that an exhaustive search
           would keep. The baseline is MinHash signatures alone, without comparing candidates truly.
Command:   python -m experiments.prepare_text --plant 10       (planted duplicates and leaks, judged)
           python -m experiments.prepare_text --builtin= --source "notes:CC0-1.0:/data/notes/**/*.txt"
Hardware:  2 CPU cores; 1 GB of memory a worker, most of it TensorFlow's.
Wall time: 35 s to prepare the standard library and 2,000 manual pages with one worker, and as many seconds again to
           learn languages and to compare exhaustively.
Expected:  missed 0, false 0 (seeds 0, 1, 2); of the pairs that signatures alone call near duplicates 26 to 32 % are not.

The source is what every machine has: the standard library's code and documentation, and the manual pages installed. What
its held-out modules document serves as an evaluation set, a paragraph an item. Killed, the same command goes on; any
number of workers writes the same bytes. With --tokenizer it also writes token ids, which experiments.pretrain_scout and its like
read, and would otherwise write first.
"""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
from absl import app, flags

from experiments import output
from llama4_jax import tokenizer as tokenizers
from llama4_jax.data import text, tokens
from llama4_jax.data.preparation import corpus, decontaminate, examples, language, planting, prepare, trial, words
from llama4_jax.data.preparation.dedup import Likeness
from llama4_jax.data.preparation.ledger import write
from llama4_jax.data.preparation.settings import Settings

FOLDER = flags.DEFINE_string("folder", "runs/text", "where shards, manifest and removed.jsonl go")
BUILTIN = flags.DEFINE_list("builtin", ["code", "documentation", "manuals"], "sources of this machine; empty for none")
SOURCE = flags.DEFINE_multi_string("source", [], "more files, as name:licence:glob; lines of .jsonl have a field text")
EVALUATION = flags.DEFINE_multi_string("evaluation", [], "files (.jsonl: a line an item) that training must not show")
LIMIT = flags.DEFINE_integer("limit", 2000, "documents of a source at most, spread evenly over it; 0 for all")
WORKERS = flags.DEFINE_integer("workers", 1, "processes that annotate")
SEED = flags.DEFINE_integer("seed", 0, "of the hash functions, the order in the shards and what is planted")
THRESHOLD = flags.DEFINE_float("threshold", 0.7, "Jaccard similarity from which documents are near duplicates")
SENTENCES = flags.DEFINE_boolean("sentences", True, "say in each record where sentences begin and end")
SHARD_MB = flags.DEFINE_float("shard_mb", 8.0, "megabytes of text in a shard")
PART_MB = flags.DEFINE_float("part_mb", 2.0, "megabytes of source files that a worker takes at a time")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenise the shards with this, for experiments.pretrain_scout")
PLANT = flags.DEFINE_integer("plant", 0, "documents of each kind to plant, which are then judged; for trials alone")
MANUALS = flags.DEFINE_string(
    "manuals", "/usr/share/man", "folder of manual pages; languages are learned from them, too"
)


def builtin_sources() -> list[corpus.Source]:
    found = []
    for name in BUILTIN.value:
        source = (
            corpus.manual_pages(MANUALS.value, LIMIT.value)
            if name == "manuals"
            else corpus.standard_library(name, limit=LIMIT.value)
        )
        if source is None:
            print(f"no manual pages in {MANUALS.value}: going on without")
        else:
            found.append(source)
    return found


def given_sources() -> list[corpus.Source]:
    found = []
    for spelled in SOURCE.value:
        if spelled.count(":") < 2:
            raise ValueError(
                f'wanted --source "name:licence:glob", got {spelled!r}; the licence goes into the manifest'
            )
        found.append(corpus.from_files(*spelled.split(":", 2), limit=LIMIT.value))
    return found


def evaluation_sets() -> dict[str, dict[str, str]]:
    sets = {pathlib.Path(path).stem: decontaminate.read_items(path) for path in EVALUATION.value}
    if set(text.KINDS) & set(BUILTIN.value):
        sets["held-out documentation"] = {
            f"{source.name}:{number}": paragraph
            for source in text.sources("documentation", "heldout")
            for number, paragraph in enumerate(source.read().split("\n\n"))
        }
    return sets


def learn_languages() -> tuple[language.Profiles | None, dict[str, float]]:
    """Profiles from every second text in a known language, and how often they are right about the others."""
    texts = examples.texts(MANUALS.value)
    profiles = language.learn({name: found[::2] for name, found in texts.items()})
    others = {name: [page for page in found[1::2] if len(page) >= 500] for name, found in texts.items()}
    return profiles, language.accuracy(profiles, others) if profiles else {}


def read(item: corpus.Item) -> str:
    return corpus.read(item).decode("utf-8", "replace")


def plant(sources: list[corpus.Source], items: dict[str, str], folder: pathlib.Path, run: int) -> tuple:
    """Writes planted documents to `folder`; (them as a source, the kind of each by name)."""
    originals = {item.name: read(item) for source in sources for item in corpus.spread(source.items, 40 * PLANT.value)}
    counts = {name: len(words.hashes(document)) for name, document in originals.items()}
    originals = {name: document for name, document in originals.items() if 200 <= counts[name] <= 5000}
    questions = {name: item for name, item in items.items() if 2 * run <= len(words.hashes(item)) <= 200}
    filling = sorted({word for document in list(originals.values())[:50] for word in words.split(document)})
    plants = planting.copies(originals, PLANT.value, SEED.value)
    plants += planting.leaks(questions, filling, PLANT.value, run, SEED.value)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {}
    for number, planted in enumerate(plants):
        path = folder / f"{number:04d}.txt"
        if not path.exists() or path.read_bytes() != planted.text.encode():
            write(path, planted.text.encode())
        kinds[str(path)] = planted.kind
    return corpus.from_files(trial.PLANTED, "made for this trial", f"{folder}/*.txt"), kinds


def table(rows: list[tuple], title: str) -> None:
    """Columns that line up: the first to the left, the others to the right."""
    cells = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def show(prepared: prepare.Prepared, accuracy: dict[str, float]) -> None:
    manifest = prepared.manifest
    rows = [("source", "documents", "MB", "kept", "MB kept", "repaired bytes", "scripts", "languages")]
    for name, source in manifest["sources"].items():
        mixes = [
            " ".join(f"{k} {100 * v:.1f}" for k, v in list(source[mix].items())[:3]) for mix in ("scripts", "languages")
        ]
        kept = source["kept"]
        sizes = (f"{source['bytes'] / 1e6:.2f}", kept["documents"], f"{kept['bytes'] / 1e6:.2f}")
        rows.append((name, source["documents"], *sizes, source["repaired_bytes"], *mixes))
    table(rows, "sources (mixes in per cent of the text kept)")
    reasons = sorted({reason for source in manifest["sources"].values() for reason in source["removed"]})
    rows = [("source", *reasons)]
    rows += [
        (k, *(source["removed"].get(reason, 0) for reason in reasons)) for k, source in manifest["sources"].items()
    ]
    table(rows, "documents removed, by reason")
    if accuracy:
        shown = sorted(accuracy.items(), key=lambda pair: pair[1])
        table(
            [("language", *(k for k, _ in shown)), ("right, %", *(f"{100 * v:.0f}" for _, v in shown))],
            "held-out pages",
        )
    if prepared.seconds:
        rows = [("stage", "seconds", "MB/s")]
        rows += [(k, f"{v:.2f}", f"{prepared.megabytes / max(v, 1e-9):.1f}") for k, v in prepared.seconds.items()]
        table(rows, f"throughput of one core over {prepared.megabytes:.1f} MB of source text (processor time)")
    print(
        f"\nwall time {prepared.wall:.1f} s, {prepared.megabytes / prepared.wall:.2f} MB/s, TensorFlow's import included"
    )


def summary_of(prepared: prepare.Prepared, accuracy: dict[str, float]) -> dict:
    """The final numbers; all others are in the manifest."""
    sources = prepared.manifest["sources"].values()
    return {
        "seed": SEED.value,
        "documents": sum(source["documents"] for source in sources),
        "kept_documents": sum(source["kept"]["documents"] for source in sources),
        "kept_megabytes": sum(source["kept"]["bytes"] for source in sources) / 1e6,
        "shards": len(prepared.manifest["shards"]),
        "language_accuracy": float(np.mean(list(accuracy.values()))) if accuracy else None,
        "wall_seconds": prepared.wall,
        "megabytes_per_second": prepared.megabytes / prepared.wall,
    }


def show_trial(found: trial.Trial) -> None:
    rows = [("planted", "documents", "to be found", "found", "missed", "false", "rejected before")]
    for kind, score in found.planted.items():
        numbers = (score.documents, score.expected, score.found, score.missed, score.false, found.rejected[kind])
        rows.append((kind, *numbers))
    table(rows, "planted documents, against exhaustive search")
    rows = [("real text", "documents", "to be found", "found", "missed", "false", "false-positive rate")]
    for name, score in (("duplicates", found.duplicates), ("leaks", found.leaks)):
        numbers = (score.documents, score.expected, score.found, score.missed, score.false)
        rows.append((name, *numbers, f"{100 * score.false_rate:.3f} %"))
    table(rows, "real documents, against exhaustive search")
    share = found.pairs_called_falsely / max(found.pairs_called, 1)
    print(
        f"\nbaseline, signatures alone: {found.pairs_called} pairs called near duplicates, {found.pairs_called_falsely} "
        f"of them falsely ({100 * share:.1f} %); exhaustive search has {found.pairs_similar}"
    )


def main(_) -> None:
    folder = pathlib.Path(FOLDER.value)
    tokenizer = tokenizers.load(TOKENIZER.value) if TOKENIZER.value else None  # a wrong path is better known now
    sources, evaluation = [*builtin_sources(), *given_sources()], evaluation_sets()
    sizes = {"part_bytes": int(PART_MB.value * 1e6), "shard_bytes": int(SHARD_MB.value * 1e6)}
    likeness = Likeness(threshold=THRESHOLD.value, seed=SEED.value)
    settings = Settings(likeness=likeness, seed=SEED.value, sentences=SENTENCES.value, **sizes)
    profiles, accuracy = learn_languages()
    items = {f"{name}/{item}": string for name, found in evaluation.items() for item, string in found.items()}
    if PLANT.value:
        planted, kinds = plant(sources, items, folder / trial.PLANTED, settings.overlap.words)
        sources.append(planted)
    prepared = prepare.run(
        *(sources, evaluation, settings, folder),
        profiles=profiles,
        num_workers=WORKERS.value,
        keep_work=bool(PLANT.value),
    )
    show(prepared, accuracy)
    if tokenizer:
        tokens.write(folder, tokenizer)
    results = summary_of(prepared, accuracy)
    if PLANT.value:
        judged = trial.judge(folder, [item for s in sources for item in s.items], items, kinds, settings)
        show_trial(judged)
        shutil.rmtree(folder / prepare.WORK)
        results |= {
            "planted_missed": sum(score.missed for score in judged.planted.values()),
            "planted_false": sum(score.false for score in judged.planted.values()),
            "duplicates_missed": judged.duplicates.missed,
            "duplicates_false_positive_rate": judged.duplicates.false_rate,
            "leaks_missed": judged.leaks.missed,
            "leaks_false_positive_rate": judged.leaks.false_rate,
            "signatures_alone_false_share": judged.pairs_called_falsely / max(judged.pairs_called, 1),
        }
    print()
    output.finish(results)


if __name__ == "__main__":
    app.run(main)
