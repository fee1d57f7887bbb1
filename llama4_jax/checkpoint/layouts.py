"""The kinds of Llama 4 checkpoint that are read and written, as tables of names.

* `HF_FUSED`: Hugging Face transformers; all experts of a layer in one tensor.
* `HF_UNFUSED`: the same names, but one linear layer an expert, as in FP8 and compressed-tensors releases.
* `META_MODULES`: the parameters of Meta's own model, as its `state_dict` names them.
* `META_FILES`: Meta's released files, which its model renames and cuts up while loading.

Source: names of `Llama4ForCausalLM` and `Llama4ForConditionalGeneration` (transformers 5.23); modules, load hooks and
resharding rules of `llama_models.llama4` and `llama_models.checkpoint` (llama-models 0.3.0).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from llama4_jax.checkpoint.mapping import ALL, Layout, Rule

HF_FUSED = Layout(
    name="Hugging Face, fused experts",
    text_prefix="language_model.",
    block_prefix="model.layers.{layer}.",
    vision_block_prefix="vision_model.model.layers.{layer}.",
    text=(
        Rule("model.embed_tokens.weight", "embed.table", "v d -> v d"),
        Rule("model.norm.weight", "norm.scale", "d -> d"),
    ),
    head=(Rule("lm_head.weight", "head.kernel", "v d -> d v"),),
    block=(
        Rule("input_layernorm.weight", "attention_norm.scale", "d -> d"),
        Rule("self_attn.q_proj.weight", "attention.query.kernel", "(n h) d -> d n h"),
        Rule("self_attn.k_proj.weight", "attention.key.kernel", "(k h) d -> d k h"),
        Rule("self_attn.v_proj.weight", "attention.value.kernel", "(k h) d -> d k h"),
        Rule("self_attn.o_proj.weight", "attention.output.kernel", "d (n h) -> n h d"),
        Rule("post_attention_layernorm.weight", "feed_forward_norm.scale", "d -> d"),
    ),
    attention_bias=(
        Rule("self_attn.q_proj.bias", "attention.query.bias", "(n h) -> n h"),
        Rule("self_attn.k_proj.bias", "attention.key.bias", "(k h) -> k h"),
        Rule("self_attn.v_proj.bias", "attention.value.bias", "(k h) -> k h"),
        Rule("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
    ),
    dense=(
        Rule("feed_forward.gate_proj.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 0)),
        Rule("feed_forward.up_proj.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 1)),
        Rule("feed_forward.down_proj.weight", "feed_forward.down.kernel", "d f -> f d"),
    ),
    moe=(
        Rule("feed_forward.router.weight", "feed_forward.router.kernel", "e d -> d e"),
        Rule("feed_forward.experts.gate_up_proj", "feed_forward.experts.gate_up", "e d (two f) -> e d two f"),
        Rule("feed_forward.experts.down_proj", "feed_forward.experts.down", "e f d -> e f d"),
        Rule(
            "feed_forward.shared_expert.gate_proj.weight", "feed_forward.shared.gate_up.kernel", "f d -> d f", (ALL, 0)
        ),
        Rule("feed_forward.shared_expert.up_proj.weight", "feed_forward.shared.gate_up.kernel", "f d -> d f", (ALL, 1)),
        Rule("feed_forward.shared_expert.down_proj.weight", "feed_forward.shared.down.kernel", "d f -> f d"),
    ),
    vision=(
        Rule("vision_model.patch_embedding.linear.weight", "vision.patch.kernel", "d p -> p d"),
        Rule("vision_model.class_embedding", "vision.class_embedding", "d -> d"),
        Rule("vision_model.positional_embedding_vlm", "vision.position_embedding", "p d -> p d"),
        Rule("vision_model.layernorm_pre.weight", "vision.norm_pre.scale", "d -> d"),
        Rule("vision_model.layernorm_pre.bias", "vision.norm_pre.bias", "d -> d"),
        Rule("vision_model.layernorm_post.weight", "vision.norm_post.scale", "d -> d"),
        Rule("vision_model.layernorm_post.bias", "vision.norm_post.bias", "d -> d"),
        Rule("vision_model.vision_adapter.mlp.fc1.weight", "vision.adapter.fc1.kernel", "o i -> i o"),
        Rule("vision_model.vision_adapter.mlp.fc2.weight", "vision.adapter.fc2.kernel", "o i -> i o"),
        Rule("multi_modal_projector.linear_1.weight", "vision.projector.kernel", "o i -> i o"),
    ),
    vision_block=(
        Rule("input_layernorm.weight", "attention_norm.scale", "d -> d"),
        Rule("input_layernorm.bias", "attention_norm.bias", "d -> d"),
        Rule("self_attn.q_proj.weight", "attention.query.kernel", "(n h) d -> d n h"),
        Rule("self_attn.q_proj.bias", "attention.query.bias", "(n h) -> n h"),
        Rule("self_attn.k_proj.weight", "attention.key.kernel", "(n h) d -> d n h"),
        Rule("self_attn.k_proj.bias", "attention.key.bias", "(n h) -> n h"),
        Rule("self_attn.v_proj.weight", "attention.value.kernel", "(n h) d -> d n h"),
        Rule("self_attn.v_proj.bias", "attention.value.bias", "(n h) -> n h"),
        Rule("self_attn.o_proj.weight", "attention.output.kernel", "d (n h) -> n h d"),
        Rule("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
        Rule("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
        Rule("post_attention_layernorm.bias", "mlp_norm.bias", "d -> d"),
        Rule("mlp.fc1.weight", "fc1.kernel", "o i -> i o"),
        Rule("mlp.fc1.bias", "fc1.bias", "o -> o"),
        Rule("mlp.fc2.weight", "fc2.kernel", "o i -> i o"),
        Rule("mlp.fc2.bias", "fc2.bias", "o -> o"),
    ),
)

HF_UNFUSED = dataclasses.replace(
    HF_FUSED,
    name="Hugging Face, separate experts",
    moe=tuple(rule for rule in HF_FUSED.moe if ".experts." not in rule.key),
    expert=(
        Rule("feed_forward.experts.{expert}.gate_proj.weight", "feed_forward.experts.gate_up", "f d -> d f", (ALL, 0)),
        Rule("feed_forward.experts.{expert}.up_proj.weight", "feed_forward.experts.gate_up", "f d -> d f", (ALL, 1)),
        Rule("feed_forward.experts.{expert}.down_proj.weight", "feed_forward.experts.down", "d f -> f d"),
    ),
)

_ENCODER = "vision_embeddings.vision_encoder."
_ADAPTER = "vision_embeddings.vision_adapter."

META_MODULES = Layout(
    name="Meta, names of modules",
    text_prefix="",
    block_prefix="layers.{layer}.",
    vision_block_prefix=_ENCODER + "transformer.resblocks.{layer}.",
    text=(
        Rule("tok_embeddings.weight", "embed.table", "v d -> v d", split="v"),
        Rule("norm.weight", "norm.scale", "d -> d"),
    ),
    head=(Rule("output.weight", "head.kernel", "v d -> d v", split="v"),),
    block=(
        Rule(
            "attention_norm.weight",
            "attention_norm.scale",
            "d -> d",
            also=("attention.wqkv.layer_norm_weight",),
        ),
        Rule("attention.wq.weight", "attention.query.kernel", "(n h) d -> d n h", split="n"),
        Rule("attention.wk.weight", "attention.key.kernel", "(k h) d -> d k h", split="k"),
        Rule("attention.wv.weight", "attention.value.kernel", "(k h) d -> d k h", split="k"),
        Rule("attention.wo.weight", "attention.output.kernel", "d (n h) -> n h d", split="n"),
        Rule(
            "ffn_norm.weight",
            "feed_forward_norm.scale",
            "d -> d",
            also=("feed_forward.norm.weight", "feed_forward.mlp.layer_norm_weight"),
        ),
    ),
    attention_bias=(),  # `meta_config` refuses models with biases
    dense=(
        Rule("feed_forward.w1.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 0), split="f"),
        Rule("feed_forward.w3.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 1), split="f"),
        Rule("feed_forward.w2.weight", "feed_forward.down.kernel", "d f -> f d", split="f"),
    ),
    moe=(
        Rule("feed_forward.router_DE", "feed_forward.router.kernel", "d e -> d e"),
        Rule("feed_forward.experts.w1", "feed_forward.experts.gate_up", "e d f -> e d f", (ALL, ALL, 0), split="f"),
        Rule("feed_forward.experts.w3", "feed_forward.experts.gate_up", "e d f -> e d f", (ALL, ALL, 1), split="f"),
        Rule("feed_forward.experts.w2", "feed_forward.experts.down", "e f d -> e f d", split="f"),
        Rule(
            "feed_forward.shared_expert.w1.weight",
            "feed_forward.shared.gate_up.kernel",
            "f d -> d f",
            (ALL, 0),
            split="f",
            also=("feed_forward.w_in_shared_FD.weight",),
        ),
        Rule(
            "feed_forward.shared_expert.w3.weight",
            "feed_forward.shared.gate_up.kernel",
            "f d -> d f",
            (ALL, 1),
            split="f",
            also=("feed_forward.w_swiglu_FD.weight",),
        ),
        Rule(
            "feed_forward.shared_expert.w2.weight",
            "feed_forward.shared.down.kernel",
            "d f -> f d",
            split="f",
            also=("feed_forward.w_out_shared_DF.weight",),
        ),
    ),
    vision=(
        Rule(_ENCODER + "conv1._linear.weight", "vision.patch.kernel", "d p -> p d", split="d"),
        Rule(_ENCODER + "class_embedding", "vision.class_embedding", "d -> d"),
        Rule(_ENCODER + "positional_embedding_vlm", "vision.position_embedding", "p d -> p d"),
        Rule(_ENCODER + "ln_pre.weight", "vision.norm_pre.scale", "d -> d"),
        Rule(_ENCODER + "ln_pre.bias", "vision.norm_pre.bias", "d -> d"),
        Rule(_ENCODER + "ln_post.weight", "vision.norm_post.scale", "d -> d"),
        Rule(_ENCODER + "ln_post.bias", "vision.norm_post.bias", "d -> d"),
        Rule(_ADAPTER + "mlp.c_fc.weight", "vision.adapter.fc1.kernel", "o i -> i o", split="o"),
        Rule(_ADAPTER + "mlp.c_proj.weight", "vision.adapter.fc2.kernel", "o i -> i o", split="i"),
        Rule("vision_projection.weight", "vision.projector.kernel", "o i -> i o", split="o"),
    ),
    vision_block=(
        Rule("ln_1.weight", "attention_norm.scale", "d -> d"),
        Rule("ln_1.bias", "attention_norm.bias", "d -> d"),
        Rule("attn.wq.weight", "attention.query.kernel", "(n h) d -> d n h", split="n"),
        Rule("attn.wq.bias", "attention.query.bias", "(n h) -> n h", split="n"),
        Rule("attn.wk.weight", "attention.key.kernel", "(n h) d -> d n h", split="n"),
        Rule("attn.wk.bias", "attention.key.bias", "(n h) -> n h", split="n"),
        Rule("attn.wv.weight", "attention.value.kernel", "(n h) d -> d n h", split="n"),
        Rule("attn.wv.bias", "attention.value.bias", "(n h) -> n h", split="n"),
        Rule("attn.wo.weight", "attention.output.kernel", "d (n h) -> n h d", split="n"),
        Rule("attn.wo.bias", "attention.output.bias", "d -> d"),
        Rule("ln_2.weight", "mlp_norm.scale", "d -> d"),
        Rule("ln_2.bias", "mlp_norm.bias", "d -> d"),
        Rule("mlp.c_fc.weight", "fc1.kernel", "o i -> i o", split="o"),
        Rule("mlp.c_fc.bias", "fc1.bias", "o -> o", split="o"),
        Rule("mlp.c_proj.weight", "fc2.kernel", "o i -> i o", split="i"),
        Rule("mlp.c_proj.bias", "fc2.bias", "o -> o"),
    ),
    dropped=(
        r".*\._extra_state",  # fp8 bookkeeping of the training framework
        r"rope\.freqs",  # recomputed from the configuration
        r"layers\.\d+\.feed_forward\.(running_gate_stats_3E|global_gate_stats_3E|expert_activation_DE)",  # statistics
    ),
)

_IN_FILES = {
    "attention.wq.weight": ("attention.wqkv.weight", None),
    "attention.wk.weight": ("attention.wqkv.weight", None),
    "attention.wv.weight": ("attention.wqkv.weight", None),
    "feed_forward.experts.w1": ("feed_forward.experts.moe_w_in_eD_F", "(e d) f -> e d f"),
    "feed_forward.experts.w3": ("feed_forward.experts.moe_w_swiglu_eD_F", "(e d) f -> e d f"),
    "feed_forward.experts.w2": ("feed_forward.experts.moe_w_out_eF_D", "(e f) d -> e f d"),
}


def _as_in_files(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of modules under the names, and with the leading axes, of Meta's files."""
    changes = [_IN_FILES.get(rule.key, (rule.key, None)) for rule in rules]
    return tuple(
        dataclasses.replace(rule, key=key, pattern=pattern or rule.pattern)
        for rule, (key, pattern) in zip(rules, changes)
    )


META_FILES = dataclasses.replace(
    META_MODULES,
    name="Meta, names of released files",
    block=_as_in_files(META_MODULES.block),
    moe=_as_in_files(META_MODULES.moe),
    dense=(
        Rule("feed_forward.mlp.fc1_weight", "feed_forward.gate_up.kernel", "(two f) d -> d two f", split="f"),
        Rule("feed_forward.mlp.fc2_weight", "feed_forward.down.kernel", "d f -> f d", split="f"),
    ),
)


def hf_layout(names: Collection[str]) -> Layout:
    """The Hugging Face layout that has tensors of these names."""
    return HF_UNFUSED if any(re.search(r"\.experts\.\d+\.", name) for name in names) else HF_FUSED


def meta_layout(names: Collection[str]) -> Layout:
    """Meta's names of modules, but each group under its names in files where `names` has those: hooks are separate."""
    marks = {"block": "attention.wqkv.weight", "moe": "experts.moe_w_in_eD_F", "dense": "mlp.fc1_weight"}
    groups = [group for group, mark in marks.items() if any(name.endswith(mark) for name in names)]
    return dataclasses.replace(
        META_MODULES,
        name=META_FILES.name if groups else META_MODULES.name,
        **{group: getattr(META_FILES, group) for group in groups},
    )
