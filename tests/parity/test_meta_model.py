"""Meta's own model and ours: same names, same files, same logits. Needs torch, llama-models and fairscale."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from llama4_jax import checkpoint
from llama4_jax.checkpoint import layouts, meta_config, positions
from llama4_jax.config import RopeScaling
from llama4_jax.testing import tiny

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # as in test_goldens.py
TEXT = np.random.RandomState(0).randint(1, 128, (1, 23))  # several chunks of 4


def config(vision: bool):
    """Dense and mixture layers by turns, in what Meta's code can express."""
    whole = tiny.vision_config(num_layers=5) if vision else tiny.text_config(5)
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192)
    attention = dataclasses.replace(whole.text.attention, rope_scaling=scaling)
    moe = dataclasses.replace(whole.text.moe, step=2)
    return dataclasses.replace(whole, text=dataclasses.replace(whole.text, attention=attention, moe=moe))


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    """A function that makes Meta's model of a configuration, on the CPU and in float32."""
    torch = pytest.importorskip("torch")
    parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize")
    pytest.importorskip("llama_models")
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    meeting = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    with pytest.MonkeyPatch.context() as patch:
        # Its caches are put on a GPU without asking.
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        yield (
            lambda config: (
                Transformer(ModelArgs(**meta_config.to_params(config)[0], max_batch_size=1, max_seq_len=64))
                .float()
                .eval()
            )
        )
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def released_files(root):
    """The module that makes files like those that Meta released."""
    path = root / "tests" / "checkpoint" / "released_files.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_torch(named: dict[str, np.ndarray]) -> dict:
    import torch

    return {key: torch.from_numpy(np.array(tensor)) for key, tensor in named.items()}


def logits_of_meta(model, tokens: np.ndarray, images: np.ndarray | None) -> np.ndarray:
    """Logits of a whole prompt; `images` [n h w c] fill the places of token 0."""
    import torch
    from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput

    tokens, embedding = torch.from_numpy(tokens), None
    with torch.no_grad():
        if images is not None:
            mask = (tokens == 0).unsqueeze(-1)
            tiles = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            found = model.vision_embeddings([[tiles]], mask, model.tok_embeddings(tokens))
            embedding = MaskedEmbedding(embedding=found, mask=mask)
        return model(TransformerInput(tokens=tokens, tokens_position=0, image_embedding=embedding)).logits.numpy()


def inputs(vision: bool) -> tuple[np.ndarray, np.ndarray | None]:
    if not vision:
        return TEXT, None
    tokens = np.concatenate([TEXT[:, :3], np.zeros((1, 4), TEXT.dtype), TEXT[:, 3:]], axis=1)
    return tokens, np.random.RandomState(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)


def logits_of_ours(model, tokens, images) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: model(tokens, images=images).logits)(model))


@pytest.mark.parametrize("vision", [False, True], ids=["text", "vision"])
def test_metas_model_and_ours_give_the_same_logits_from_metas_file(vision, metas, tmp_path):
    import torch

    drawn = tiny.model(config(vision), seed=2)
    theirs = metas(drawn.config)
    theirs.load_state_dict(to_torch(checkpoint.to_tensors(drawn, layouts.META_MODULES)), strict=True)
    params, extras = meta_config.to_params(drawn.config)
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "llama4_jax.json").write_text(json.dumps(extras))
    torch.save(theirs.state_dict(), tmp_path / "consolidated.00.pth")
    ours = checkpoint.load_meta(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(drawn), strict=True))
    tokens, images = inputs(vision)
    wanted = logits_of_meta(theirs, tokens, images)
    np.testing.assert_allclose(logits_of_ours(ours, tokens, images), wanted, rtol=0, atol=TOLERANCE)


def test_metas_load_hooks_read_what_the_tests_call_released_files(released_files, metas):
    modules = checkpoint.to_tensors(tiny.model(config(True)), layouts.META_MODULES)
    theirs = metas(config(True))
    loading = theirs.load_state_dict(to_torch(released_files.released(modules, 0, 1)), strict=True)
    assert not loading.missing_keys and not loading.unexpected_keys
    for key, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), modules[key])


def test_metas_resharding_joins_what_the_tests_cut(released_files, metas):
    """The rules by which Meta itself joins shards, on our idea of how they were cut."""
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    modules = checkpoint.to_tensors(tiny.model(config(True)), layouts.META_MODULES)
    shards = [
        convert_moe_weights(to_torch(released_files.released(modules, shard, 2)), config(True).text.moe.num_experts)
        for shard in (0, 1)
    ]
    joined = reshard_mp(shards, size=1, rank=0)
    for key, tensor in released_files.released(modules, 0, 1).items():
        np.testing.assert_array_equal(joined[key].numpy().reshape(tensor.shape), tensor, err_msg=key)


def test_metas_load_hook_resamples_old_positions_as_we_do(metas):
    modules = checkpoint.to_tensors(tiny.model(config(True)), layouts.META_MODULES)
    old = np.random.RandomState(3).normal(size=modules.pop(positions.NEW).shape).astype(np.float32)
    theirs = metas(config(True))
    theirs.load_state_dict(to_torch(modules | {positions.OLD: old}), strict=False)
    found = theirs.state_dict()[positions.NEW].numpy()
    np.testing.assert_allclose(found, positions.resample(old), rtol=0, atol=1e-6)
