"""The exchange compiles for real slices, as one operation or out of gathers; nothing runs here, and nothing is timed."""

import json

# v5e routes freely up to 16 chips; the last line is what `choose` keeps users from.
PROGRAMS = (
    *(("v5e:4x4", None), ("v5p:2x2x2", None), ("v6e:4x8", None), ("tpu7x:2x2x2", None)),
    *(("v5e:4x8", None), ("v5e:4x8", "native")),
)


def compiled(topology_name: str, implementation: str | None) -> str:
    """What the compiler made of the exchange, or its refusal; in a process that may start libtpu."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from llama4_jax.core import partitioning
    from llama4_jax.kernels.exchange import ragged_all_to_all
    from llama4_jax.plan import topology

    mesh = partitioning.make_mesh({"expert": -1}, topology.devices(topology_name))
    spread, devices = PartitionSpec("expert"), mesh.size

    def local(rows, numbers):
        out = jnp.zeros((64, rows.shape[1]), rows.dtype)
        return ragged_all_to_all(rows, out, *(numbers[0],) * 4, axis_name="expert", implementation=implementation)

    arrays = jax.ShapeDtypeStruct((16 * devices, 256), "bfloat16"), jax.ShapeDtypeStruct((devices, devices), "int32")
    with jax.set_mesh(mesh):
        call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spread, spread), out_specs=spread, check_vma=False))
        try:
            text = call.lower(*arrays).compile().as_text()
        except jax.errors.JaxRuntimeError as error:
            return str(error)
    return " ".join(name for name in ("ragged-all-to-all", "all-gather") if f" {name}" in text)


def test_a_slice_gets_one_operation_or_gathers_where_the_compiler_has_none(printed):
    *free, gathered, refused = printed(__file__)
    assert free == ["ragged-all-to-all"] * 4 and gathered == "all-gather"
    assert "not supported in limited ICI routing" in refused


if __name__ == "__main__":
    for program in PROGRAMS:
        print(json.dumps(compiled(*program)), flush=True)
