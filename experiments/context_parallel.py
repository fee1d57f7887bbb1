"""What attention sends when devices share a row: next to nothing in chunked layers, one ring in global ones, work even.

Claim:     a chunked layer sends nothing where a device's pieces are whole chunks of aligned documents, and otherwise the
           end of each piece, less than a chunk; so a Llama 4 of 3 chunked layers to a global one sends little more than a
           quarter of what a ring over all layers would. In zig-zag order a document's causal work is the same everywhere.
Command:   python -m experiments.context_parallel
           python -m experiments.context_parallel --preset=scout --length=524288 --devices=64 --block=2048
Hardware:  2 CPU cores, 2 GB of memory; 20 seconds (Scout: one or two minutes). Programs are compiled, not run.
Expected:  exactly: 25.0 % of a ring over all layers with aligned documents, 28.2 % with documents that begin anywhere (in
           zig-zag order, with two pieces a device, 31.4 %); work of the busiest device over the mean 1.00 in zig-zag
           order, 1.86 without. Scout over 64 devices: 25.0 to 27.0 %; work 1.00 and 1.98. Packed rows are uneven in either
           order: with 2 to 16 documents anywhere 1.3 to 1.6 in zig-zag order, 1.6 to 2.0 without; over 64 devices 1.5 to
           2.2 and 2.2 to 2.9.

Bytes are read from the compiled programs, loops counted as often as they run (`llama4_jax/plan`), for one row and float32
keys; a device that takes part in every transfer sends so many. Work is pairs of query and key blocks that the mask leaves
anything in. It is even for one document a row; of packed ones each has its own triangle, wherever they lie, and a second table
says how uneven that leaves the ring of a global layer, over draws of where documents begin.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax import config as configs
from llama4_jax.config import Attention, Llama4Config, layer_kinds, presets
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import LONG, TRAIN, Placement
from llama4_jax.kernels.attention import Layout, attend_sequence, neighbours, ring
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.plan import count, hlo

PRESET = flags.DEFINE_enum("preset", "nano", sorted(presets.PRESETS), "the model")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.attention.chunk_size=256")
DEVICES = flags.DEFINE_integer("devices", 8, "simulated devices, which share the row", lower_bound=2)
LENGTH = flags.DEFINE_integer("length", 1024, "tokens of the row", lower_bound=1)
BLOCK = flags.DEFINE_integer("block", 16, "tokens of the blocks that work is counted in", lower_bound=1)
DRAWS = flags.DEFINE_integer("draws", 16, "rows of packed documents that are drawn for each number of them")
SEED = flags.DEFINE_integer("seed", 0, "of the lengths of packed documents")

ORDERS = {"contiguous": TRAIN, "zig-zag": LONG}
DOCUMENTS = {"aligned": 1, "anywhere": 4}  # in the row
PACKED = (1, 2, 4, 8, 16, 32)


def main(_) -> None:
    output.quiet_libraries()
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    config = configs.apply(presets.PRESETS[PRESET.value](), SET.value)
    chunks = {"chunked": config.text.attention.chunk_size, "global": None}
    cases = [(layer, order, documents) for layer in chunks for order in ORDERS for documents in DOCUMENTS]
    rows = {}
    for layer, order, documents in tqdm(cases, desc="compiling", dynamic_ncols=True):
        placement = dataclasses.replace(ORDERS[order], aligned=DOCUMENTS[documents] == 1 and layer == "chunked")
        work = work_of(placement, chunks[layer], DOCUMENTS[documents], SEED.value)
        rows[layer, order, documents] = {
            "forward": sent(config, placement, chunks[layer], train=False),
            "training": sent(config, placement, chunks[layer], train=True),
            "work_most": int(work.max()),
            "work_mean": float(work.mean()),
        }
    show(rows)
    uneven = {order: {str(count): unevenness(ORDERS[order], count) for count in PACKED} for order in ORDERS}
    show_unevenness(uneven)
    output.finish(
        {"devices": DEVICES.value, "length": LENGTH.value, "chunk_size": chunks["chunked"]}
        | {" ".join(case): row for case, row in rows.items()}
        | {"of_a_ring_over_all_layers": shares(config, rows), "busiest_over_mean_of_packed_rows": uneven}
    )


@functools.cache
def sent(config: Llama4Config, placement: Placement, chunk_size: int | None, *, train: bool) -> int:
    """Bytes that the busiest device sends for one layer's attention, with its gradient where `train`."""
    attention, mesh = config.text.attention, partitioning.make_mesh({"context": DEVICES.value})

    def array(heads: int):
        shape = (1, LENGTH.value, heads, attention.head_dim)
        sharding = partitioning.batch_sharding(shape[:2], placement, mesh)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def forward(query, key, value, positions, segments):
        return attend_sequence(query, key, value, positions, segments, chunk_size)

    def run(query, key, value, *tokens):
        out, pull_back = jax.vjp(lambda *arrays: forward(*arrays, *tokens), query, key, value)
        return pull_back(out)

    token = jax.ShapeDtypeStruct((1, LENGTH.value), jnp.int32, sharding=array(1).sharding)
    key = array(attention.num_kv_heads)
    with partitioning.use(mesh, placement):
        lowered = jax.jit(run if train else forward).lower(array(attention.num_heads), key, key, token, token)
    return int(count.count(hlo.parse(lowered.compile().as_text()), mesh.shape).wire_bytes)


def work_of(placement: Placement, chunk_size: int | None, documents: int, seed: int) -> np.ndarray:
    """Pairs of blocks that each device computes for a row of so many documents, which begin anywhere."""
    positions = np.arange(LENGTH.value)
    starts = np.random.default_rng(seed).choice(positions[1:], documents - 1, replace=False)
    segments = 1 + np.isin(positions, starts).cumsum()
    positions = positions - np.searchsorted(segments, segments)
    layout = Layout.of(placement, partitioning.make_mesh({"context": DEVICES.value}))
    blocking = Blocking(queries=BLOCK.value, keys=BLOCK.value, chunk_size=chunk_size)
    rows = [layout.place(tokens[None]) for tokens in (positions, segments)]
    return ring.work(*rows, DEVICES.value, blocking) if chunk_size is None else neighbours.work(*rows, layout, blocking)


def unevenness(placement: Placement, documents: int) -> float:
    """Work of the busiest device over the mean in the ring of a global layer, averaged over draws."""
    draws = range(SEED.value, SEED.value + (DRAWS.value if documents > 1 else 1))
    works = [work_of(placement, None, documents, seed) for seed in draws]
    return float(np.mean([work.max() / work.mean() for work in works]))


def show(rows) -> None:
    print(f"\nbytes that a device sends for a layer, {DEVICES.value} devices and one row of {LENGTH.value:,} tokens")
    print(
        f"{'layer':8} {'order':11} {'documents':10} {'forward':>13} {'training':>13} {'of a ring':>10} {'work most/mean':>15}"
    )
    for (layer, order, documents), row in rows.items():
        share = row["training"] / rows["global", order, documents]["training"]
        balance = row["work_most"] / row["work_mean"]
        sizes = f"{row['forward']:13,} {row['training']:13,}"
        print(f"{layer:8} {order:11} {documents:10} {sizes} {share:10.1%} {balance:15.2f}")
    print()


def show_unevenness(uneven) -> None:
    print("work of the busiest device over the mean, global layer, documents that begin anywhere")
    print("documents in the row" + "".join(f"{count:7}" for count in PACKED))
    for order, row in uneven.items():
        print(f"{order:20}" + "".join(f"{value:7.2f}" for value in row.values()))
    print()


def shares(config: Llama4Config, rows) -> dict[str, float]:
    """What all layers send in training, over a ring in each."""
    kinds = [kind.attention is Attention.CHUNKED for kind in layer_kinds(config.text)]
    found = {}
    for order in ORDERS:
        for documents in DOCUMENTS:
            chunked, whole = (rows[layer, order, documents]["training"] for layer in ("chunked", "global"))
            found[f"{order} {documents}"] = sum(chunked if each else whole for each in kinds) / (whole * len(kinds))
    return found


if __name__ == "__main__":
    app.run(main)
