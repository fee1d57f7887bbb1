"""How a model is trained, as frozen dataclasses; imports no JAX."""

from __future__ import annotations

import dataclasses

from llama4_jax.config.quant import PRESETS, QuantRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; learning rate by warm-up and cosine."""

    name: str = "adamw"  # "adamw" or "muon"
    learning_rate: float = 2e-3  # at its highest, after warm-up
    warmup_steps: int = 100  # steps of linear growth from learning_rate / warmup_steps
    final_fraction: float = 0.1  # learning rate at the last step, as a share of the highest
    beta1: float = 0.9  # decay of Adam's mean of gradients
    beta2: float = 0.98  # decay of Adam's mean of squared gradients
    epsilon: float = 1e-8  # added to Adam's denominator
    weight_decay: float = 0.1  # decoupled, times the learning rate; on projection matrices only
    clip_norm: float = 1.0  # longest global gradient, in L2 norm
    momentum: float = 0.95  # Muon's decay of its mean of gradients
    muon_rms: float = 0.2  # root mean square of Muon's update before the learning rate (AdamW's is about 0.2)

    def __post_init__(self):
        _member(self, "name", ("adamw", "muon"))
        _positive(self, "learning_rate", "epsilon", "clip_norm", "muon_rms")
        _not_negative(self, "warmup_steps", "weight_decay")
        _share(self, "final_fraction", "beta1", "beta2", "momentum")


# Names that layers give to what is worth keeping; all else in a block is computed again in the backward pass. Kept bytes
# buy as many products wherever they are spent on projections of the residual stream, and twice as many on attention.
REMAT = {
    "none": None,  # everything is kept and nothing computed again
    "block": (),
    "attention": ("attended",),  # the output of attention and its log-sum-exp
    "projections": ("query_key_value", "attended", "after_attention"),  # feed-forward layers alone are computed again
    "shared": ("shared",),  # gate and up of dense layers and shared experts
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatConfig:
    """Quantisation-aware training: from step `start` on, products see weights as `recipe` will leave them; see `train.qat`."""

    recipe: str | None = None  # a name in config.quant.PRESETS; None: no rounding at all
    group: int | None = 128  # inputs that share a scale; small models want 32; None: one scale an output
    start: int = 0  # the first step that rounds
    gradual: int = 0  # steps from there on in eight bits, before the four of the recipe
    ranges: str = "minmax"  # of each block, from its weights; "learned": times a share that is trained
    cache: str | None = (
        None  # "int8": keys and values are rounded as a cache of that dtype holds them; with a recipe or alone
    )

    def __post_init__(self):
        _member(self, "recipe", (None, *PRESETS))
        _member(self, "ranges", ("minmax", "learned"))
        _member(self, "cache", (None, "int8"))
        _not_negative(self, "start", "gradual")
        if self.gradual and not (self.recipe and any(spec.values == "int4" for _, spec in self.preset.rules)):
            raise ValueError(
                f"QatConfig.gradual={self.gradual} wants a recipe in four bits, got recipe={self.recipe!r}"
            )

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded at all."""
        return bool(self.recipe or self.cache)

    @property
    def preset(self) -> QuantRecipe:
        """The recipe of that name, with this group."""
        return PRESETS[self.recipe](self.group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, apart from the model and the data."""

    steps: int  # optimiser steps in the whole run; the schedule's length
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    accumulation: int = 1  # loader batches whose gradients make one step
    compute_dtype: str = "float32"  # "float32" or "bfloat16"; master weights and router stay float32
    remat: str = "none"  # what the backward pass finds, besides each block's input: see REMAT
    kept_in: str = "device"  # where it finds that and the inputs; "host": in the memory of the accelerator's host
    z_loss: float = 0.0  # weight of logsumexp(logits)^2, which keeps logits from drifting
    balance_loss: float = 0.0  # weight of the experts' balance loss
    router_z_loss: float = 0.0  # weight of the router's own z-loss
    bias_rate: float = 0.0  # step of the selection-only bias towards an even load; needs moe.selection_bias
    logits_limit: int = 2**24  # most logits held at once, per device; more are computed in chunks of time
    log_every: int = 10  # steps between lines of metrics
    save_every: int = 500  # steps between checkpoints
    keep: int = 3  # checkpoints kept, newest first
    on_nan: str = "stop"  # "stop", or "rollback": back to the last checkpoint, without the offending batch
    seed: int = 0  # of the generator handed to the objective
    qat: QatConfig = dataclasses.field(default_factory=QatConfig)  # rounding to few bits while training; off by default

    def __post_init__(self):
        _member(self, "compute_dtype", ("float32", "bfloat16"))
        _member(self, "remat", tuple(REMAT))
        _member(self, "kept_in", ("device", "host"))
        if self.remat == "none" and self.kept_in == "host":
            raise ValueError("kept_in='host' wants a policy that says what is kept; remat='none' has none, use another")
        _member(self, "on_nan", ("stop", "rollback"))
        _positive(self, "steps", "accumulation", "logits_limit", "log_every", "save_every", "keep")
        _not_negative(self, "z_loss", "balance_loss", "router_z_loss", "bias_rate")
        if self.qat.rounds and self.qat.start >= self.steps:
            raise ValueError(
                f"qat.start={self.qat.start} is past the last of steps={self.steps}: nothing would be rounded"
            )


def _member(config, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{type(config).__name__}.{name}={value!r}; use one of {', '.join(map(repr, allowed))}")


def _positive(config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must be positive")


def _not_negative(config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must be 0 or more")


def _share(config, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must lie in [0, 1]")
