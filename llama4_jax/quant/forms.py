"""Which axes of a parameter its product sums over: what a group of weights with one scale lies along.

By the end of a parameter's dotted name, because a flat dict of parameters knows nothing else of them. Stacked parameters
have a leading axis more, so axes are counted from the last.
"""

from __future__ import annotations

# Axes from the last, outermost first. Modules: nn.attention, nn.mlp, nn.moe, nn.vit, nn.patch, model.vision, model.llama4.
INPUTS = {
    "attention.query.kernel": (-3,),  # [d n h]
    "attention.key.kernel": (-3,),  # [d k h]
    "attention.value.kernel": (-3,),  # [d k h]
    "attention.output.kernel": (-3, -2),  # [n h d]
    "gate_up.kernel": (-3,),  # [d 2 f]
    "down.kernel": (-2,),  # [f d]
    "experts.gate_up": (-3,),  # [e d 2 f]
    "experts.down": (-2,),  # [e f d]
    "router.kernel": (-2,),  # [d e]
    "fc1.kernel": (-2,),
    "fc2.kernel": (-2,),
    "patch.kernel": (-2,),
    "projector.kernel": (-2,),
    "head.kernel": (-2,),  # [d v]
    "embed.table": (-1,),  # [v d]: a row is looked up whole, and a tied unembedding sums over d
}


def inputs_of(name: str, ndim: int) -> tuple[int, ...] | None:
    """The axes that the parameter of this name sums over, outermost first; None if it is in no product (norms, biases)."""
    axes = next((axes for end, axes in INPUTS.items() if ("." + name).endswith("." + end)), None)
    return axes and tuple(ndim + axis for axis in axes)
