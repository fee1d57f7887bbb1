"""How densely vocabularies of 4k to 256k write 14 languages, code, mathematics and LaTeX, and what density is worth.

Claim:     a larger, denser vocabulary shortens sequences: Llama 4's 200k tokens write each of the 14 languages, maths and
           LaTeX in fewer tokens than Llama 3's 128k (code in as many), and of vocabularies trained here on one corpus
           the larger is the denser on every text. What is saved is not free: the output matrix grows with the
           vocabulary, and for code 256k tokens cost Scout more operations a document than 128k.
Command:   python -m experiments.tokenizer_density          (needs: pip install django llama-models)
Hardware:  2 CPU cores, 4 GB of memory; half a minute, so "minutes" on a slow machine.
Expected:  tokens of Llama 4 over tokens of Llama 3, within 0.02: mean of the languages 0.87, code 1.01, LaTeX 0.93.

Everything is measured on held-out messages and modules (see `data/breadth.py`). A vocabulary trained here knows Django's
wording and the packages' names from the other three quarters, which Llama's do not: compare ours with ours and Llama 4
with Llama 3. Nothing is random.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from statistics import fmean

import matplotlib
import tiktoken
from absl import app, flags

from experiments import output
from llama4_jax.config import Llama4Config, presets
from llama4_jax.data import breadth
from llama4_jax.model import accounting
from llama4_jax.tokenizer import Tokenizer, bpe, fertility, special, training

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt

FOLDER = flags.DEFINE_string("folder", "runs/tokenizer_density", "where tables.json, density.png and vocabularies go")
SIZES = flags.DEFINE_list("sizes", "4000,16000,64000,128000,256000", "vocabularies to train, special tokens included")
PACKAGES = flags.DEFINE_list(
    "packages",
    "numpy,scipy,matplotlib,jax,jaxlib,flax,optax,grain,orbax,PIL,fontTools,tensorflow,keras",
    "whose code and formulas to read",
)
REPEATS = flags.DEFINE_integer("repeats", 8, "how often each message counts in training: they are few beside the code")
MOST = flags.DEFINE_integer("most", 200_000, "bytes of each kind of text to measure on, at most", lower_bound=1)
DOCUMENT = flags.DEFINE_integer("document", 100_000, "bytes of the document whose cost is told", lower_bound=1)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
METRICS = {
    "tokens_per_word": "tokens per word (zh, ja, th: per character)",
    "bytes_per_token": "bytes per token",
    "unbroken_share": "share of unbroken words",
}
Table = dict[str, dict[str, float]]  # kind of text -> tokenizer -> number


def published() -> dict[str, tuple[int, fertility.Pieces]]:
    """Name -> (ids in all, how it cuts a text) of Llama 3's and Llama 4's tokenizers, from the wheel llama-models."""
    found = importlib.util.find_spec("llama_models")
    if found is None:
        raise app.UsageError("the published vocabularies are in the wheel llama-models; pip install llama-models")
    folder = pathlib.Path(found.origin).parent
    ranks = bpe.read(folder / "llama3" / "tokenizer.model")
    llama3 = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    llama4 = bpe.load(folder / "llama4" / "tokenizer.model")
    return {
        "Llama 3": (len(ranks) + 256, lambda text: llama3.decode_tokens_bytes(llama3.encode_ordinary(text))),
        "Llama 4": (llama4.vocab_size, llama4.pieces),
    }


def trained(texts: list[str], sizes: list[int], folder: pathlib.Path) -> dict[str, tuple[int, fertility.Pieces]]:
    """The same of vocabularies trained on `texts`, and their files in `folder`; the last is what the texts yield."""
    ranks = training.merges(texts, max(sizes) - len(special.USED), min_count=2)
    found = {}
    for size in sorted(sizes):
        # The first merges of the largest vocabulary are those of each smaller one.
        mine = {token: rank for token, rank in ranks.items() if rank < size - len(special.USED)}
        tokenizer = Tokenizer(mine)
        bpe.save(mine, folder / f"{tokenizer.vocab_size}.model")
        found[f"{tokenizer.vocab_size / 1000:.3g}k"] = (tokenizer.vocab_size, tokenizer.pieces)
        if tokenizer.vocab_size < size:
            print(f"no {size:,} tokens: the corpus holds no further pair twice after {tokenizer.vocab_size:,}")
            break
    return found


def costs(bytes_per_token: Table, sizes: Mapping[str, int]) -> dict[str, Table]:
    """What reading DOCUMENT bytes costs Scout with each vocabulary: group of texts -> tokenizer -> numbers."""
    scout, told = presets.scout().text, {}
    for group, kinds in {"mean of the languages": breadth.LANGUAGES, "code": ["code"], "maths": ["maths"]}.items():
        told[group] = {}
        for name, size in sizes.items():
            length = round(fmean(DOCUMENT.value / bytes_per_token[kind][name] for kind in kinds))
            config = Llama4Config(text=dataclasses.replace(scout, vocab_size=size))
            flops = accounting.forward_flops(config, length) * length
            cache = accounting.cache_bytes(config, length)
            told[group][name] = {"tokens": length, "TFLOP": flops / 1e12, "KV MiB": cache / 2**20}
    return told


def show(title: str, table: Table, digits: int) -> None:
    columns, first = list(next(iter(table.values()))), max(map(len, [title, *table]))
    print(f"\n{title:<{first}}  " + " ".join(f"{name:>9}" for name in columns))
    for name, row in table.items():
        print(f"{name:<{first}}  " + " ".join(f"{row[column]:9,.{digits}f}" for column in columns))


def draw(path: pathlib.Path, density: Table, sizes: Mapping[str, int], ratio: Mapping[str, float]) -> None:
    """Density against size, ours as lines and Llama's as marks; and how much shorter Llama 4 is than Llama 3."""
    ours = [name for name in sizes if not name.startswith("Llama")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, colour in zip(("en", "ru", "hi", "th", "ja", "code", "LaTeX"), plt.get_cmap("tab10").colors):
        left.plot([sizes[n] for n in ours], [density[kind][n] for n in ours], "-", color=colour, label=kind)
        for name, mark in (("Llama 3", "^"), ("Llama 4", "o")):
            left.plot(sizes[name], density[kind][name], mark, color=colour)
    left.set_xscale("log")
    left.set_xticks([sizes[name] for name in ours], ours)
    left.minorticks_off()
    left.set(xlabel="tokens in the vocabulary", ylabel="bytes per token", ylim=(0, None))
    left.set_title("Lines: trained here. Marks: Llama 3 (triangle), Llama 4 (dot)", fontsize=10)
    left.legend(fontsize=8, ncol=2)
    right.barh(list(ratio), [100 * (1 - value) for value in ratio.values()], color="#3b5b92")
    right.invert_yaxis()
    right.set(xlabel="%")
    right.set_title("Tokens that Llama 4 saves against Llama 3", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(path)


def main(_) -> None:
    folder = pathlib.Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = breadth.read(PACKAGES.value, repeats=REPEATS.value, most=MOST.value)
    print(f"training on {sum(map(len, corpus.train)) / 1e6:.1f} M characters")
    tokenizers = published() | trained(corpus.train, [int(size) for size in SIZES.value], folder)
    sizes = {name: size for name, (size, _) in tokenizers.items()}
    counts = {
        kind: {name: fertility.measure(pieces, texts) for name, (_, pieces) in tokenizers.items()}
        for kind, texts in corpus.heldout.items()
    }
    tables = {
        metric: {kind: {name: getattr(count, metric) for name, count in row.items()} for kind, row in counts.items()}
        for metric in METRICS
    }
    show("held-out text", {k: {"bytes": c["Llama 4"].bytes, "words": c["Llama 4"].words} for k, c in counts.items()}, 0)
    for metric, title in METRICS.items():
        show(title, tables[metric], 2)
    tables["cost"] = costs(tables["bytes_per_token"], sizes)
    for group, table in tables["cost"].items():
        show(f"{DOCUMENT.value:,} bytes, {group}, Scout", table, 0)
    ratio = {kind: row["Llama 4"].tokens / row["Llama 3"].tokens for kind, row in counts.items()}
    draw(folder / "density.png", tables["bytes_per_token"], sizes, ratio)
    (folder / "tables.json.tmp").write_text(json.dumps({"vocab_size": sizes} | tables, indent=1))
    (folder / "tables.json.tmp").replace(folder / "tables.json")
    print(f"\ntokens of Llama 4 over tokens of Llama 3; all tables: {folder / 'tables.json'}")
    output.finish(ratio | {"mean of the languages": fmean(ratio[code] for code in breadth.LANGUAGES)})


if __name__ == "__main__":
    app.run(main)
