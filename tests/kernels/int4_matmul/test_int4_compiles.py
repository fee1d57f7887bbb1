"""The kernels compile for every generation of TPUs, ahead of time, and no float copy of a weight is made; nothing is timed."""

import functools
import json
import re

from llama4_jax.kernels.int4_matmul import blocks

# An odd number of groups, and outputs that fill no whole number of blocks, but of 128: other weights XLA keeps turned round.
ROWS, INPUTS, OUTPUTS = 5, 384, 1152
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled(topology_name: str, spec: dict, group_sizes: tuple[int, ...] | None) -> dict:
    """Facts of a compiled product that was left to choose its implementation; in a process that may start libtpu."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from llama4_jax.config.quant import QuantSpec
    from llama4_jax.core import partitioning
    from llama4_jax.kernels.int4_matmul import api
    from llama4_jax.kernels.int4_matmul.workloads import Workload
    from llama4_jax.plan import topology

    workload = Workload(rows=ROWS, inputs=INPUTS, outputs=OUTPUTS, spec=QuantSpec(**spec), group_sizes=group_sizes)
    mesh = partitioning.make_mesh({}, topology.devices(topology_name)[:1])
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), workload.shapes())
    with jax.set_mesh(mesh):
        product = functools.partial(api.matmul, dtype="float32") if group_sizes is None else api.grouped
        program = jax.jit(product).lower(*shapes).compile()
    text = program.as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line and "%int4_" in line]
    return {
        "kernels": [re.search(r"%(int4_[a-z]+)", line).group(1) for line in calls],
        "int8 rows": any(f"s8[{ROWS},{INPUTS}]" in line for line in calls),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def test_products_compile_for_every_generation_and_keep_weights_in_few_bits(printed):
    facts = printed(__file__)
    assert len(facts) == 2 * len(CHIPS)
    for fact in facts:
        assert fact["kernels"] == [fact["wanted"]]
        assert fact["int8 rows"] == (fact["wanted"] == "int4_matmul" and fact["chip"] in blocks.INT8)
        assert fact["temporaries"] < fact["matrices"] * INPUTS * OUTPUTS  # bytes: a copy in bfloat16 takes twice that


if __name__ == "__main__":
    for chip in CHIPS:
        programs = [
            ("int4_matmul", {"activations": "int8", "symmetric": False}, None),
            ("int4_grouped", {}, (2, 0, 1)),
        ]
        for name, *program in programs:
            fact = compiled(CHIPS[chip], *program)
            print(json.dumps(fact | {"chip": chip, "wanted": name, "matrices": len(program[1] or (1,))}), flush=True)
