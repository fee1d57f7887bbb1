"""What a choice costs in closed form: rough and instant, to leave out what is not worth compiling.

A training step gathers each dense weight over what stores it, forward and backward, and scatters its gradient; routed
experts likewise over what splits their inputs; rows of tokens travel to their experts and back (twice forward, three times
backward); `tensor` adds up each product's results, and a ring passes keys and values on. Activations are those of
`plan.memory`. Serving reads its weights and its cache once a step.

How rough: of Scout on 128 v5p chips (fsdp 8 x expert 16, 256 x 8192 tokens, remat block) it says 24.5 GiB a chip and 115
GiB on the wire, where the compiled step has 29.7 and 118.
"""

from __future__ import annotations

import dataclasses
import math

from llama4_jax.config import Attention, FeedForward, layer_kinds
from llama4_jax.config.train import REMAT
from llama4_jax.model import accounting
from llama4_jax.plan import conversion, memory, report, topology, weights
from llama4_jax.plan.job import Choice, Job

BYTES = 2  # of a number that is gathered, sent or computed with: bfloat16
SENDS = 5  # of a routed row in a training step: out and back; out, its gradient out, and back
SUMS = 8  # of a layer's activations over `tensor` in a training step: three forward, five backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one device: GiB at most, what a step takes, and its seconds by each limit."""

    memory: float
    wire_gib: float
    matrix_pflop: float  # of products besides attention
    products: float
    hbm: float
    wire: float
    host: float = 0.0

    @property
    def seconds(self) -> tuple[float, float]:
        """By the slowest limit, and all together where that is equal: what choices are ordered by."""
        limits = self.products, self.hbm, self.wire, self.host
        return max(limits), sum(limits)


def of(job: Job, choice: Choice) -> Estimate:
    """The estimate of a step. Sizes need not divide the mesh: whether they do is for `search` to see."""
    held, read, sent = {"train": _training, "conversion": _conversion}.get(job.mode, _serving)(job, choice)
    device = topology.device(job.topology)
    flops, attention = _flops(job, choice), job.attention_flops(choice)
    return Estimate(
        memory=held / memory.GIB,
        wire_gib=sent / memory.GIB,
        matrix_pflop=flops / 1e15,
        products=_product_seconds(job, device, flops) + attention / device.flops,
        hbm=read / device.hbm,
        wire=sent / device.link,
        host=host_bytes(job, choice) / device.host,
    )


def host_bytes(job: Job, choice: Choice) -> float:
    """Bytes that a device sends to the memory of its host and fetches again in a step."""
    if job.mode != "train" or choice.kept_in == "device":
        return 0.0
    kept = memory.kept_between(job.config.text, job.settings(choice), job.own_tokens(choice), BYTES)
    return 2 * choice.accumulation * kept


def _flops(job: Job, choice: Choice) -> float:
    """A device's products besides attention, those that are computed again included."""
    again = 2 * _weights_again(job, choice) * job.tokens / job.size if job.mode == "train" else 0
    passes = 3 if job.mode == "train" else 1
    forward = accounting.forward_flops(job.config, job.length) - report.attention_flops(job.config, job.length, 1, 1)
    return passes * forward * job.tokens / job.size + again


def _weights_again(job: Job, choice: Choice) -> float:
    """Weights that a token meets once more in the backward pass; down projections give nothing that is needed there."""
    count, kept, attention = accounting.parameters(job.config), REMAT[choice.remat], job.config.text.attention
    routed = count.active_experts * 2 / 3  # their own gradient keeps their input alone, whatever the policy
    if kept is None:
        return routed
    output = attention.num_heads / (2 * (attention.num_heads + attention.num_kv_heads))
    parts = {
        "query_key_value": count.attention * (1 - output),
        "after_attention": count.attention * output,
        "shared": (count.dense + count.shared_experts) * 2 / 3,
    }
    return routed + sum(weights for name, weights in parts.items() if name not in kept)


def _training(job: Job, choice: Choice) -> tuple[float, float, float]:
    """Bytes of a device: held, read and written in HBM, and sent."""
    text, sizes, count = job.config.text, choice.sizes, accounting.parameters(job.config)
    tensor, stored, inside = sizes["tensor"], choice.ways("embed"), choice.ways("expert_embed")
    own = job.own_tokens(choice)
    need = memory.train(job.config, job.settings(choice), batch=1, length=own)
    weights = (need.weights + need.optimizer + need.gradients) / stored / tensor
    # Embeddings and the output matrix are never gathered, and text does not visit the vision tower.
    dense = BYTES * (count.attention + count.dense + count.shared_experts + count.router) / tensor
    routed = BYTES * count.routed_experts / sizes["expert"] / tensor
    gathered = 3 * choice.accumulation * (dense * (1 - 1 / stored) + routed * (1 - 1 / inside))
    copies = job.size / stored / tensor
    reduced = 2 * (1 - 1 / copies) * BYTES * count.total / stored / tensor
    travelling = choice.accumulation * own * (_rows(job, choice) + _sums(job, choice) + _ring(job, choice))
    # Each layer's activations are written and read, forward and backward, as are weights that were gathered.
    read = 2 * choice.accumulation * (3 * (dense + routed) + 2 * text.num_layers * own * memory.kept_bytes(text, BYTES))
    return weights + need.activations + need.workspace / tensor, read, gathered + reduced + travelling


def _conversion(job: Job, choice: Choice) -> tuple[float, float, float]:
    """The same of parameters made of a checkpoint in bfloat16: both are there at once, and nothing is sent."""
    count, tensor = accounting.parameters(job.config), choice.sizes["tensor"]
    routed = count.routed_experts / choice.ways("experts") / choice.ways("expert_embed")
    dense = (count.total - count.routed_experts - count.vision) / choice.ways("embed")
    weights = (routed + dense + count.vision / choice.ways("vision_embed")) / tensor
    held = (BYTES + conversion.dtype(choice.placement).itemsize) * weights
    return held, held, 0.0


def _rows(job: Job, choice: Choice) -> float:
    """Bytes sent for a token on its way to experts and back, in all layers."""
    text = job.config.text
    mixtures = sum(kind.feed_forward is FeedForward.MOE for kind in layer_kinds(text))
    share = 1 - 1 / choice.sizes["expert"]
    return (SENDS if job.mode == "train" else 2) * mixtures * text.moe.top_k * text.embed_dim * BYTES * share


def _sums(job: Job, choice: Choice) -> float:
    """Bytes sent for a token where layers add up over `tensor`."""
    text, share = job.config.text, 2 * (1 - 1 / choice.sizes["tensor"])
    return (SUMS if job.mode == "train" else 3) * text.num_layers * text.embed_dim * BYTES * share


def _ring(job: Job, choice: Choice) -> float:
    """Bytes sent for a token of keys and values: forward twice unless kept, backward with gradients in float32."""
    text, hops = job.config.text, choice.ways("time") - 1
    layers = sum(kind.attention is Attention.GLOBAL for kind in layer_kinds(text))
    width = 2 * text.attention.num_kv_heads * text.attention.head_dim / choice.sizes["tensor"]
    return hops * layers * width * (3 * BYTES + 4)


def _serving(job: Job, choice: Choice) -> tuple[float, float, float]:
    """The same of a step without gradients, with weights and cache as `job.kept` has them."""
    sizes, heads = choice.sizes, job.config.text.attention.num_kv_heads
    rows, tensor = math.ceil(job.batch / choice.ways("batch")), sizes["tensor"]
    own = rows * job.tokens // job.batch
    part = weights.by_part(job.config, job.kept.recipe)
    held = sum(part.values()) - part["routed_experts"] * (1 - 1 / sizes["expert"])
    copies = choice.ways("batch") / sizes["expert"]  # of all experts, each met by its share of the tokens
    read = sum(weights.read(job.config, job.kept.recipe, math.ceil(job.tokens / copies), sizes["expert"]))
    # Devices beyond the heads hold the same keys as others.
    cache = accounting.cache_bytes(job.config, job.length, batch=rows, dtype=job.kept.cache) / min(tensor, heads)
    sent = own * (_rows(job, choice) + _sums(job, choice))
    return held / tensor + cache + job.activations(choice), read / tensor + cache, sent


def _product_seconds(job: Job, device: topology.Device, flops: float) -> float:
    """Of products besides attention; those with inputs in int8 are as fast as the device multiplies integers, if it does."""
    low = flops * weights.int8_share(job.config, job.kept.recipe)
    return (flops - low) / device.flops + low / (device.int8 or device.flops)
