"""Meta's released files made from the parameters of Meta's modules, without the tables that read them.

The parameters are cut up as fairscale's parallel layers do; then the load hooks of Meta's modules are undone.

Source: `llama_models.llama4` and `llama_models.checkpoint` (llama-models 0.3.0).
"""

from __future__ import annotations

import re

import numpy as np

# Endings of the names of parameters that shards divide, by the axis that they divide.
DIVIDED = {
    0: (
        *("tok_embeddings.weight", "output.weight", "conv1._linear.weight", "vision_projection.weight"),
        *("wq.weight", "wk.weight", "wv.weight", "wq.bias", "wk.bias", "wv.bias", "w1.weight", "w3.weight"),
        *("c_fc.weight", "c_fc.bias"),
    ),
    1: ("wo.weight", "w2.weight", "c_proj.weight", "experts.w2"),
    2: ("experts.w1", "experts.w3"),
}


def cut(modules: dict[str, np.ndarray], shard: int, shards: int) -> dict[str, np.ndarray]:
    """What shard `shard` of Meta's model holds."""

    def part(name, tensor):
        axis = next((axis for axis, endings in DIVIDED.items() if name.endswith(endings)), None)
        return tensor if axis is None else np.split(tensor, shards, axis)[shard]

    return {name: part(name, tensor) for name, tensor in modules.items()}


def released(modules: dict[str, np.ndarray], shard: int, shards: int) -> dict[str, np.ndarray]:
    """The same as files name it: what the load hooks turn into the modules' parameters."""
    own = cut(modules, shard, shards)
    found = {"rope.freqs": np.zeros(4, np.float32)}
    for layer in sorted({match.group() for name in own if (match := re.match(r"layers\.\d+\.", name))}):
        heads = [own.pop(f"{layer}attention.w{name}.weight") for name in "qkv"]
        found[layer + "attention.wqkv.weight"] = np.concatenate(heads)
        found[layer + "attention.wqkv.layer_norm_weight"] = own.pop(layer + "attention_norm.weight")
        found[layer + "attention.wqkv._extra_state"] = np.zeros(3, np.float32)
        undo = _mixture if layer + "feed_forward.router_DE" in own else _dense
        found |= undo(own, layer + "feed_forward.", own.pop(layer + "ffn_norm.weight"))
    return own | found


def _mixture(own: dict[str, np.ndarray], prefix: str, norm: np.ndarray) -> dict[str, np.ndarray]:
    found = {prefix + "norm.weight": norm}
    for module, name in (("w1", "moe_w_in_eD_F"), ("w3", "moe_w_swiglu_eD_F"), ("w2", "moe_w_out_eF_D")):
        tensor = own.pop(f"{prefix}experts.{module}")
        found[f"{prefix}experts.{name}"] = tensor.reshape(-1, tensor.shape[-1])
    for module, name in (("w1", "w_in_shared_FD"), ("w3", "w_swiglu_FD"), ("w2", "w_out_shared_DF")):
        found[f"{prefix}{name}.weight"] = own.pop(f"{prefix}shared_expert.{module}.weight")
    return found


def _dense(own: dict[str, np.ndarray], prefix: str, norm: np.ndarray) -> dict[str, np.ndarray]:
    return {
        prefix + "mlp.layer_norm_weight": norm,
        prefix + "mlp.fc1_weight": np.concatenate([own.pop(prefix + "w1.weight"), own.pop(prefix + "w3.weight")]),
        prefix + "mlp.fc2_weight": own.pop(prefix + "w2.weight"),
    }
