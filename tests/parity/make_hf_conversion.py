"""Makes tests/goldens/hf_conversion.json: what Hugging Face's own script makes of a tiny checkpoint in Meta's form.

    python tests/parity/make_hf_conversion.py --converter PATH            write the golden
    python tests/parity/make_hf_conversion.py --converter PATH --check    make it again and compare

PATH is `src/transformers/models/llama4/convert_llama4_weights_to_hf.py` of Hugging Face transformers, which its wheels
leave out: download it (the golden is of commit 0749750, read with transformers 5.23). Its `write_model` is run on files of
`torch.save`, up to and with the strict loading into transformers' model and the saving of that. The script fits the
released sizes alone, so its constants are replaced in memory (`CHANGES`), and nothing else.

The conversion of this project is run on the same files and compared, before anything is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import tempfile
import types

import numpy as np
import torch
import transformers
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "checkpoint")]
import drawn_meta  # noqa: E402

from llama4_jax import checkpoint  # noqa: E402
from llama4_jax.checkpoint import hf_config, layouts, meta_config  # noqa: E402
from llama4_jax.config import Llama4Config, RopeScaling  # noqa: E402
from llama4_jax.testing import tiny  # noqa: E402

GOLDEN = ROOT / "tests" / "goldens" / "hf_conversion.json"
CHANGES = (  # what stands in the script, how often, and what is run instead
    ("8, 1024)", 2, "num_shards, EXPERT_SHARD)"),  # experts' width of one of the 8 shards
    ("-1, 1024)", 2, "-1, EXPERT_SHARD)"),
    ("range(8)", 2, "range(num_shards)"),
    ("reshape(8, -1, 5120)", 1, "reshape(num_shards, -1, dim)"),
    ("view(num_experts, -1, 5120)", 1, "view(num_experts, -1, dim)"),
    # The vocabulary, the width of dense layers and most of the vision tower are constants in its configuration.
    ("config = Llama4Config(text_config=text_config, vision_config=vision_config)", 1, "config = CONFIG"),
    # What follows the saving generates text, for which the released tokenizer would be needed.
    ("""    print("Reloading the model to check if it's saved correctly.")""", 1, "    return"),
)


def config() -> Llama4Config:
    """Multimodal, dense and mixture layers by turns, and everything that shards divide can be divided by 8."""
    whole = tiny.vision_config(num_layers=5)
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192)
    attention = dataclasses.replace(
        whole.text.attention, num_heads=16, num_kv_heads=8, head_dim=4, rope_scaling=scaling
    )
    moe = dataclasses.replace(whole.text.moe, step=2)
    text = dataclasses.replace(whole.text, embed_dim=64, attention=attention, moe=moe)
    vision = dataclasses.replace(whole.vision, num_heads=8, mlp_dim=4 * whole.vision.embed_dim)
    return dataclasses.replace(whole, text=text, vision=vision)


def converter(path: pathlib.Path, **constants) -> types.ModuleType:
    """The script as a module, with its constants replaced. Raises ValueError if it is not the script we know."""
    source = path.read_text()
    for old, times, new in CHANGES:
        if source.count(old) != times:
            raise ValueError(f"{path}: {old!r} stands there {source.count(old)} times, wanted {times}; take 0749750")
        source = source.replace(old, new)
    module = types.ModuleType(path.stem)
    vars(module).update(constants)
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def save_torch(named: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """One file as Meta's training framework leaves it: float tensors, and bytes for `_extra_state`."""

    def value(key, array):
        if key.endswith("_extra_state"):
            return io.BytesIO(b"state")
        bits = torch.from_numpy(array.view(np.int16 if array.dtype.itemsize == 2 else np.int32).copy())
        return bits.view(torch.bfloat16 if array.dtype.itemsize == 2 else torch.float32)

    torch.save({key: value(key, array) for key, array in named.items()}, path)


def prints_of(folder: pathlib.Path) -> dict[str, dict]:
    """Fingerprints of the safetensors files in `folder`."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name).contiguous()
                bits = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
                found[name] = drawn_meta.fingerprint(bits)
    return dict(sorted(found.items()))


def convert(golden: dict, dtype: str, shards: int, path: pathlib.Path, folder: pathlib.Path) -> dict[str, dict]:
    """What the script at `path` makes of the golden's checkpoint, after a look at whether ours makes the same."""
    model = config()
    source = drawn_meta.write(folder / "meta", golden, dtype, shards, save_torch, ".pth")
    theirs = transformers.Llama4Config(**hf_config.to_hf(model, dtype))
    module = converter(path, CONFIG=theirs, EXPERT_SHARD=model.text.moe.expert_dim // shards)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.write_model(str(folder / "theirs"), str(source), shards, convert_checkpoints=True)
    checkpoint.save_hf(checkpoint.load_meta(source, dtype=None), folder / "ours")
    wanted, ours = prints_of(folder / "theirs"), prints_of(folder / "ours")
    wrong = sorted(name for name in wanted.keys() | ours.keys() if wanted.get(name) != ours.get(name))
    print(f"{dtype:>9} in {shards} files: {len(wanted)} tensors by their script, {len(wrong)} of ours differ")
    if wrong:
        raise ValueError("ours differ from theirs in:\n  " + "\n  ".join(wrong))
    return wanted


def make(path: pathlib.Path) -> dict:
    """The golden."""
    model = config()
    params, extras = meta_config.to_params(model)
    golden = {
        "about": "made by tests/parity/make_hf_conversion.py with Hugging Face's convert_llama4_weights_to_hf.py, 0749750",
        "seed": 0,
        "params.json": params,
        "llama4_jax.json": extras,
        "shapes": {name: list(shape) for name, shape in checkpoint.tensor_shapes(model, layouts.META_MODULES).items()},
        "tensors": {},
    }
    for dtype in drawn_meta.DTYPES:
        for shards in drawn_meta.SHARDS:
            with tempfile.TemporaryDirectory() as scratch:
                found = convert(golden, dtype, shards, path, pathlib.Path(scratch))
            if golden["tensors"].setdefault(dtype, found) != found:
                raise ValueError(f"their script makes something else of {shards} files than of {drawn_meta.SHARDS[0]}")
    return golden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=pathlib.Path, required=True, help="convert_llama4_weights_to_hf.py")
    parser.add_argument("--check", action="store_true", help="compare with the golden instead of writing it")
    arguments = parser.parse_args()
    golden = make(arguments.converter)
    if not arguments.check:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    elif golden != json.loads(GOLDEN.read_text()):
        raise SystemExit(f"{GOLDEN} is not what the script makes; if that is intended, run without --check")
    print(f"{GOLDEN} {'is what the script makes' if arguments.check else 'written'}")


if __name__ == "__main__":
    main()
