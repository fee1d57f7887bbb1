"""Adapters against PEFT: it computes what we saved, and we compute what it saved, routed experts included."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint, infer
from llama4_jax.config.lora import ATTENTION, DENSE, ROUTED_EXPERTS, SHARED_EXPERTS, LoraConfig
from llama4_jax.model import lora
from llama4_jax.testing import adapters, goldens

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # as in test_goldens.py; adapters move the logits by whole units
SEED = 2000  # of weights and tokens
NEW = 6

# Dense layers and mixtures in one model, chunks of 16 and 58 tokens, a stack and leftover layers.
MIXED = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
TEXT = r"language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # q_proj is in the tower too


@dataclasses.dataclass
class Base:
    """A checkpoint of transformers: its folder, its model there and ours, and tokens [b t]."""

    folder: pathlib.Path
    hf: object
    ours: object
    tokens: np.ndarray


@pytest.fixture(scope="module")
def maker():
    """The module that makes goldens; needs torch."""
    import make_goldens
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return make_goldens


@pytest.fixture(params=["text", "multimodal"])
def base(request, maker, tmp_path) -> Base:
    import torch

    extra = {} if request.param == "text" else {"vision": maker.VISION, "seq": 45}
    config, model_class = maker.build_config(maker.BASE | MIXED | extra)
    folder = tmp_path / "base"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in model_class(config).named_parameters()}
    save_file(goldens.draw_all(shapes, SEED), folder / "model.safetensors", metadata={"format": "pt"})
    hf = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = np.random.RandomState(SEED).randint(1, 100, (2, 58))
    return Base(folder, hf, checkpoint.load_hf(folder), tokens)


def run_hf(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def run(model, tokens) -> np.ndarray:
    return np.asarray(jax.jit(type(model).__call__)(model, np.asarray(tokens, np.int32)).logits)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=5.0, targets=ATTENTION + DENSE + SHARED_EXPERTS),
        LoraConfig(rank=3, alpha=5.0, targets=ROUTED_EXPERTS),
        LoraConfig(rank=2, alpha=3.0, targets=("*",), rank_stabilised=True),
        LoraConfig(rank=2, alpha=3.0, targets=("experts.down", "attention.output.kernel")),
    ],
    ids=["linear", "experts", "all_rs", "experts_down"],
)
def test_peft_computes_what_we_saved(base, config, tmp_path):
    import peft

    model = adapters.trained(base.ours, config)
    checkpoint.save_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base.hf, tmp_path / "adapter").eval()
    held = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert held.keys() == stored.keys() and all(np.array_equal(held[key], stored[key]) for key in stored)
    got = run(model, base.tokens)
    assert np.abs(got - run(base.ours, base.tokens)).max() > 0.5
    np.testing.assert_allclose(got, run_hf(theirs, base.tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LINEAR},
        {"target_modules": [], "target_parameters": EXPERTS},
        {"target_modules": [], "target_parameters": EXPERTS[:1]},
        {"target_modules": LINEAR, "target_parameters": EXPERTS, "use_rslora": True},
    ],
    ids=["linear", "experts", "experts_gate_up", "all_rs"],
)
def test_we_compute_what_peft_saved(base, settings, tmp_path):
    import peft
    import torch

    torch.manual_seed(0)
    if base.ours.config.vision and settings["target_modules"]:
        settings = settings | {"target_modules": TEXT}
    # Both factors random: as it starts, PEFT's zero factor would hide every mistake.
    config = peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(base.hf, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = checkpoint.load_peft(base.ours, tmp_path / "adapter")
    wanted, got = run_hf(theirs, base.tokens), run(model, base.tokens)
    assert np.abs(got - run(base.ours, base.tokens)).max() > 0.5
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(run(lora.merge(model), base.tokens), wanted, rtol=0, atol=TOLERANCE)


def test_decoding_with_adapters_takes_the_tokens_that_peft_finds_likeliest(base, tmp_path):
    import peft

    model = adapters.trained(base.ours, LoraConfig(rank=2, alpha=3.0, targets=("*",)))
    checkpoint.save_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base.hf, tmp_path / "adapter").eval()
    prompts = base.tokens[:, :14].tolist()  # decoding passes the border of a chunk of 16
    new = infer.generate(model, prompts, max_new_tokens=NEW)
    whole = run_hf(theirs, [prompt + row for prompt, row in zip(prompts, new)])
    assert new == whole[:, 13:-1].argmax(-1).tolist()
