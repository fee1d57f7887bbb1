"""The grouped product compiles for real chips with the arithmetic of its rows alone; nothing runs here, and nothing is timed."""

import json
import re

PROGRAMS = [(name, "bfloat16") for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")] + [
    ("v5e:2x2", "float32")
]
# Rows and inputs that fill no whole number of tiles.
ROWS, GROUPS, INPUTS, OUTPUTS = 2000, 4, 2500, 4096
FEW = 3  # rows of a decoding step


def compiled(topology_name: str, dtype: str) -> dict:
    """Facts of the compiled gradient, and of a product of few rows; in a process that may start libtpu."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from llama4_jax.core import partitioning
    from llama4_jax.kernels.grouped_matmul import grouped_matmul
    from llama4_jax.plan import count, hlo, topology

    mesh = partitioning.make_mesh({}, topology.devices(topology_name)[:1])

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def gradients(lhs, rhs, group_sizes, cotangent):
        out, pull = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, group_sizes), lhs, rhs)
        return out, pull(cotangent)

    matrices = shape(GROUPS, INPUTS, OUTPUTS), shape(GROUPS, dtype="int32")
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(shape(ROWS, INPUTS), *matrices, shape(ROWS, OUTPUTS))
        text = lowered.compile().as_text()
        few = jax.jit(grouped_matmul).lower(shape(FEW, INPUTS), *matrices).compile().as_text()
    return {
        "kernels": kernels(text),
        "kernels of few rows": kernels(few),
        "flops": count.count(hlo.parse(text), mesh.shape).matrix_flops,
    }


def kernels(text: str) -> list[str]:
    return sorted(re.findall(r"%(tgmm|ragged-dot-none)\S* = .* custom-call\(", text))


def test_products_compile_for_every_generation_and_none_multiplies_rows_with_other_groups(printed):
    facts = printed(__file__)
    assert len(facts) == len(PROGRAMS)
    for fact in facts:
        assert fact["kernels"] == ["ragged-dot-none", "ragged-dot-none", "tgmm"]
        assert fact["kernels of few rows"] == ["ragged-dot-none"]  # which leaves matrices unread that no row meets
        product = 2 * INPUTS * OUTPUTS
        assert 3 * ROWS * product <= fact["flops"] <= (2 * ROWS + 2048) * product  # of d rhs, whole tiles


if __name__ == "__main__":
    for program in PROGRAMS:
        print(json.dumps(compiled(*program)), flush=True)
