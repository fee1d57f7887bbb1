"""Makes the golden folders in tests/goldens with Hugging Face transformers, or checks that they can be made again.

    python tests/parity/make_goldens.py            write the goldens of all variants
    python tests/parity/make_goldens.py --check    make them in a temporary folder and compare

Needs torch and transformers (the extra [parity]). Weights are drawn from (seed, name), see llama4_jax/testing/goldens.py.
A seed is passed over when a router's choice or a greedy step is so close that fp32 rounding could turn it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from llama4_jax.testing import goldens  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
MARGIN = 1e-3  # smallest gap allowed between a choice and the runner-up, in logits
SCOUT_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
SMOOTH_ROPE = {  # at head width 16 some frequencies fall in each of the three bands of the rule
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 32,
    "intermediate_size_mlp": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 5e-3,  # large, so that a wrong epsilon shows
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope": SCOUT_ROPE,
    "seq": 58,
    "new_tokens": 24,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": 24,
    "patch_size": 6,
    "vision_output_dim": 56,
    "projector_input_dim": 56,
    "projector_output_dim": 56,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
SPECIAL = dict(zip(("image_start", "image_end", "tile_x", "tile_y", "image", "patch"), range(120, 126)))
VARIANTS = {
    "scout": {},
    "maverick": {
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 8,
        "num_local_experts": 8,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "rms_norm_eps": 1e-5,
        "rope": {"rope_type": "default"},
    },
    "vision": {
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 40,
        "rope": SMOOTH_ROPE,
        "seq": 45,
        "vision": VISION,
    },
    "top2": {
        "num_hidden_layers": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 3,
        "no_rope_layer_interval": 2,
        "rope": SMOOTH_ROPE,
    },
    "nope3_tail": {
        "num_hidden_layers": 8,
        "hidden_size": 32,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 7,
        "floor_scale": 5,
        "seq": 31,
    },
    "bias": {"attention_bias": True, "attn_scale": 0.3, "num_hidden_layers": 4, "num_key_value_heads": 1},
    "tied": {
        "tie_word_embeddings": True,
        "attn_temperature_tuning": False,
        "num_hidden_layers": 5,
        "no_rope_layer_interval": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing it")
    check = parser.parse_args().check
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wrong = []
    for name, variant in VARIANTS.items():
        if check:
            wrong += check_variant(name, {**BASE, **variant})
        else:
            write_variant(name, {**BASE, **variant})
    if wrong:
        sys.exit("goldens differ:\n" + "\n".join(wrong))


def write_variant(name: str, variant: dict) -> None:
    """Takes the first seed whose choices are all clear."""
    for seed in range(100):
        arrays, meta = make(GOLDENS / name, variant, seed)
        smallest = min(meta["router_margin"], meta["greedy_margin"])
        if smallest >= MARGIN:
            np.savez_compressed(GOLDENS / name / "golden.npz", **arrays)
            (GOLDENS / name / "meta.json").write_text(json.dumps(meta) + "\n")
            print(
                f"{name}: seed {seed}, smallest margin {smallest:.4f}, cached against uncached {meta['cache_error']:.1e}"
            )
            return
    raise RuntimeError(f"{name}: no seed below 100 keeps every choice {MARGIN} apart")


def check_variant(name: str, variant: dict) -> list[str]:
    """What differs between the golden in the repository and one made now."""
    stored = json.loads((GOLDENS / name / "meta.json").read_text())
    with tempfile.TemporaryDirectory() as scratch, np.load(GOLDENS / name / "golden.npz") as golden:
        arrays, meta = make(pathlib.Path(scratch), variant, stored["seed"])
        wrong = [f"{name}: {key}" for key in ("sha256", "shapes") if meta[key] != stored[key]]
        wrong += [f"{name}: arrays {sorted(arrays.keys() ^ golden.keys())}"] if arrays.keys() != golden.keys() else []
        for key in arrays.keys() & golden.keys():
            difference = np.abs(arrays[key] - golden[key]).max()
            if difference > (1e-4 if arrays[key].dtype.kind == "f" else 0):
                wrong.append(f"{name}: {key} by {difference}")
    print(f"{name}: {'differs' if wrong else 'as stored'}")
    return wrong


@torch.no_grad()
def make(folder: pathlib.Path, variant: dict, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """Writes the configuration to `folder`; runs the model. Returns the golden's arrays and its description."""
    config, model_class = build_config(variant)
    config.save_pretrained(folder)
    with torch.device("meta"):
        named = model_class(config).named_parameters()
        shapes = {key: list(parameter.shape) for key, parameter in named}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": None}) + "\n")
    weights = goldens.draw_all(shapes, seed)
    with tempfile.TemporaryDirectory() as scratch:
        goldens.write_checkpoint(folder, pathlib.Path(scratch), weights, goldens.digest(weights))
        model = model_class.from_pretrained(scratch, attn_implementation="eager", dtype=torch.float32).eval()

    tokens, pixels = inputs(variant, np.random.RandomState(seed))
    arrays = {"input_ids": tokens} | ({} if pixels is None else {"pixel_values": pixels})
    given = {"input_ids": torch.from_numpy(tokens)}
    extra = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)}
    taps = tap(model)
    arrays["logits"] = model(**given, **extra, use_cache=False).logits.numpy()
    arrays.update(taps)
    generated = model.generate(
        **given,
        **extra,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=variant["new_tokens"],
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    arrays["greedy_ids"] = generated.sequences.numpy()
    arrays["greedy_logits"] = torch.stack(generated.logits, 1).numpy()
    whole = model(input_ids=generated.sequences, **extra, use_cache=False).logits.numpy()
    top_k = variant["num_experts_per_tok"]
    # By now the taps hold the last run: prompt and continuation.
    router_margins = [margin(value, top_k) for key, value in taps.items() if key.endswith("router_logits")]
    meta = {
        "seed": seed,
        "sha256": goldens.digest(weights),
        "router_margin": min(router_margins, default=float("inf")),
        "greedy_margin": margin(arrays["greedy_logits"], 1),
        "cache_error": float(np.abs(whole[:, tokens.shape[1] - 1 : -1] - arrays["greedy_logits"]).max()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shapes": shapes,
    }
    return arrays, meta


def build_config(variant: dict):
    fields = {key: value for key, value in variant.items() if key not in ("rope", "seq", "new_tokens", "vision")}
    text = Llama4TextConfig(**fields, rope_parameters={**variant["rope"], "rope_theta": 500_000.0})
    if "vision" not in variant:
        return text, Llama4ForCausalLM
    config = Llama4Config(
        text_config=text.to_dict(),
        vision_config=variant["vision"],
        boi_token_index=SPECIAL["image_start"],
        eoi_token_index=SPECIAL["image_end"],
        image_token_index=SPECIAL["patch"],
    )
    return config, Llama4ForConditionalGeneration


def inputs(variant: dict, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray | None]:
    """Two rows of tokens [2 t]; with vision the first has a picture of two tiles and the whole, the second one tile."""
    tokens = random.randint(1, min(SPECIAL.values()), (2, variant["seq"]))
    tokens[:, 0] = variant["bos_token_id"]
    if "vision" not in variant:
        return tokens, None
    vision = variant["vision"]
    side = vision["image_size"]
    tile = ["patch"] * (side // vision["patch_size"] // 2) ** 2
    pictures = (
        ["image_start", *tile, "tile_x", *tile, "tile_y", "image", *tile, "image_end"],
        ["image_start", "image", *tile, "image_end"],
    )
    for row, picture in zip(tokens, pictures):
        row[4 : 4 + len(picture)] = [SPECIAL[name] for name in picture]
    return tokens, random.uniform(-1, 1, (4, 3, side, side)).astype(np.float32)


def tap(model) -> dict[str, np.ndarray]:
    """A dict that each forward pass fills with hidden states and router logits."""
    found: dict[str, np.ndarray] = {}

    def keep(module, key: str, part: int = 0) -> None:
        def hook(module, arguments, output):
            output = output[part] if isinstance(output, tuple) else output
            found[key] = output.numpy().copy()

        module.register_forward_hook(hook)

    text = model.language_model.model if hasattr(model, "vision_model") else model.model
    for i, layer in enumerate(text.layers):
        keep(layer, f"hs.layer{i}.out")
        if layer.is_moe_layer:
            keep(layer.feed_forward.router, f"hs.layer{i}.router_logits", part=1)
    keep(text.norm, "hs.final_norm")
    if hasattr(model, "vision_model"):
        for i, layer in enumerate(model.vision_model.model.layers):
            keep(layer, f"hs.vision.layer{i}.out")
        keep(model.vision_model.layernorm_post, "hs.vision.ln_post")
        keep(model.vision_model.vision_adapter, "hs.vision.adapter_out")
        keep(model.multi_modal_projector, "hs.vision.projected")
    return found


def margin(logits: np.ndarray, k: int) -> float:
    """Smallest distance between the k-th and the next value of any row."""
    ordered = np.sort(logits, axis=-1)
    return float((ordered[..., -k] - ordered[..., -k - 1]).min())


if __name__ == "__main__":
    main()
