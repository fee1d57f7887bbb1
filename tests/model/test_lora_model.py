"""Adapters on a whole model: attached, trained alone, merged, taken out again, and decoded with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama4_jax import checkpoint, infer
from llama4_jax.config.lora import ATTENTION, DENSE, ROUTED_EXPERTS, SHARED_EXPERTS, LoraConfig
from llama4_jax.config.train import OptimizerConfig
from llama4_jax.core import names
from llama4_jax.model import lora
from llama4_jax.testing import adapters, budget, tiny
from llama4_jax.train import optim

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("*",))
TIME = 11  # chunks of 4
# Four layers of at most 24 + 32 terms, and the output matrix; logits and hidden states stay below 30.
TOLERANCE = budget.matmul_tolerance(jnp.float32, 4 * (24 + 32) + 32, magnitude=30.0)


def mixed_config(num_layers: int = 4):
    """Chunked layers dense, global ones mixtures; four layers are two periods in a stack, two stand alone."""
    config = tiny.text_config(num_layers)
    moe = dataclasses.replace(config.text.moe, step=2)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe))


@pytest.fixture(scope="module")
def model():
    return tiny.model(mixed_config())


@pytest.fixture(scope="module")
def adapted(model):
    return adapters.trained(model, CONFIG)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.RandomState(0).randint(1, 128, (2, TIME)).astype(np.int32)


@jax.jit
def logits(model, tokens):
    return model(tokens).logits


def bits(model) -> dict[str, tuple]:
    params = names.split(model)[1]
    return {name: (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in params.items()}


@pytest.mark.parametrize("num_layers", [4, pytest.param(2, marks=pytest.mark.thorough)])
def test_new_adapters_change_no_bit_of_the_logits(num_layers, tokens):
    plain = tiny.model(mixed_config(num_layers))
    attached = lora.attach(plain, CONFIG)
    np.testing.assert_array_equal(logits(attached, tokens), logits(plain, tokens))
    assert bits(lora.detach(attached)) == bits(plain)
    again, other = lora.attach(plain, CONFIG), lora.attach(plain, CONFIG, seed=1)
    assert bits(again) == bits(attached) != bits(other)
    drawn = [value for name, value in bits(attached).items() if name.endswith("lora_a")]
    assert len(set(drawn)) == len(drawn)  # each from a key of its own


def test_merged_weights_give_the_logits_of_the_adapters(model, adapted, tokens):
    found = logits(adapted, tokens)
    assert np.abs(found - logits(model, tokens)).max() > 1.0
    merged = lora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(logits(merged, tokens), found, rtol=0, atol=TOLERANCE)
    assert lora.merge(model) is model


def test_merging_and_unmerging_gives_every_bit_of_the_base_back(model, adapted):
    merged = lora.merge(adapted)
    changed = {name for name, value in bits(merged).items() if value != bits(model)[name]}
    assert changed == set(lora.deltas(adapted)) and len(changed) == 14
    restored = lora.unmerge(merged, adapted)
    assert bits(restored) == bits(model)
    assert jax.tree.structure(restored) == jax.tree.structure(model)


def test_a_model_trained_after_merging_is_not_unmerged(adapted):
    structure, params = names.split(lora.merge(adapted))
    params["norm.scale"] = params["norm.scale"].at[0].add(1e-3)
    with pytest.raises(ValueError, match="1 parameters of the merged model .* norm.scale among them"):
        lora.unmerge(structure.merge(params), adapted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_subtracting_from_a_merged_model_errs_by_two_roundings(dtype, model, adapted):
    structure, factors, base = lora.split(adapted)
    base = {name: leaf.astype(dtype) for name, leaf in base.items()}
    merged = names.split(lora.merge(structure.merge(factors | base)))[1]
    assert {leaf.dtype for leaf in merged.values()} == {jnp.dtype(dtype)}
    restored = lora.split(lora.subtract(structure.merge(factors | merged)))[2]
    unit, worst = budget.unit_roundoff(dtype), 0.0
    for name, wanted in base.items():
        w, m, r = (np.asarray(leaf[name], np.float64) for leaf in (base, merged, restored))
        if name in lora.deltas(adapted):
            bound = (unit + 2.0**-23) * (np.abs(m) + np.abs(r)) * (1 + 4 * unit)
            assert (np.abs(r - w) <= bound).all(), name
            worst = max(worst, float((np.abs(r - w) / bound).max()))
        else:
            np.testing.assert_array_equal(wanted, restored[name])
    assert worst > 0.25  # the bound is no looser than it need be


def test_a_merge_in_bfloat16_rounds_once(adapted):
    structure, factors, base = lora.split(adapted)
    half = structure.merge(factors | {name: leaf.astype(jnp.bfloat16) for name, leaf in base.items()})
    merged = names.split(lora.merge(half))[1]
    for name, delta in lora.deltas(half).items():
        exact = np.asarray(base[name].astype(jnp.bfloat16), np.float64) + np.asarray(delta.matrix(), np.float64)
        allowed = (budget.unit_roundoff(jnp.bfloat16) + 2.0**-22) * np.abs(exact) + 1e-7
        assert (np.abs(np.asarray(merged[name], np.float64) - exact) <= allowed).all(), name


@pytest.fixture(scope="module")
def step():
    """One step of AdamW on the adapters alone: (adapters, state, base) -> the same, gradients, loss."""

    def make(structure):
        optimizer = optim.make(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), steps=20)

        @jax.jit
        def run(factors, state, base, tokens):
            def loss(factors):
                found = structure.merge(factors | base)(tokens).logits[:, :-1]
                return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

            value, gradients = jax.value_and_grad(loss)(factors)
            updates, state = optimizer.update(gradients, state, factors)
            return optax.apply_updates(factors, updates), state, gradients, value

        return optimizer, run

    return make


def test_training_moves_the_adapters_and_nothing_else(model, tokens, step):
    before = bits(model)
    structure, factors, base = lora.split(lora.attach(model, CONFIG))
    optimizer, run = step(structure)
    state, losses_seen = optimizer.init(factors), []
    for i in range(6):
        factors, state, gradients, loss = run(factors, state, base, tokens)
        losses_seen.append(float(loss))
        if i == 0:
            # B is zero: its own gradient is there from the start, and A's only afterwards.
            moving = {name for name, gradient in gradients.items() if np.any(gradient != 0)}
            assert moving == {name for name in factors if name.endswith("lora_b")}
    assert all(np.any(gradient != 0) for gradient in gradients.values())
    assert losses_seen[-1] < losses_seen[0] - 0.5
    assert bits(lora.detach(structure.merge(factors | base))) == before == bits(model)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in factors.values())


def test_the_optimiser_never_orthogonalises_a_factor(adapted):
    assert {optim.role(name) for name in lora.split(adapted)[1]} == {optim.Role.EDGE}


def test_decoding_with_adapters_equals_decoding_after_merging_and_whole_passes(adapted):
    prompts, new = [[5, 17, 90], [3, 1, 4, 1, 5, 9, 2]], 6  # over borders of chunks of 4
    found = infer.generate(adapted, prompts, max_new_tokens=new)
    assert found == infer.generate(lora.merge(adapted), prompts, max_new_tokens=new)
    for prompt, row in zip(prompts, found):
        padded = np.ones((1, 16), np.int32)
        padded[0, : len(prompt) + new] = prompt + row
        whole = np.asarray(logits(adapted, padded)).argmax(-1)[0]
        assert row == whole[len(prompt) - 1 : len(prompt) - 1 + new].tolist()


def test_a_cache_serves_the_model_with_adapters_as_it_is(adapted, tokens):
    run = jax.jit(lambda model, tokens, cache: (lambda out: (out.logits, out.cache))(model(tokens, cache=cache)))
    cache, parts = adapted.init_cache(2, TIME), []
    for piece in (tokens[:, :5], tokens[:, 5:10], tokens[:, 10:]):
        part, cache = run(adapted, piece, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), logits(adapted, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (
            ATTENTION,
            {"attention.query.kernel", "attention.key.kernel", "attention.value.kernel", "attention.output.kernel"},
        ),
        (DENSE, {"feed_forward.gate_up.kernel", "feed_forward.down.kernel"}),
        (SHARED_EXPERTS, {"feed_forward.shared.gate_up.kernel", "feed_forward.shared.down.kernel"}),
        (ROUTED_EXPERTS, {"feed_forward.experts.gate_up", "feed_forward.experts.down"}),
        (("query.kernel", "experts.down"), {"attention.query.kernel", "feed_forward.experts.down"}),
    ],
)
def test_targets_choose_parameters(model, targets, wanted):
    found = lora.deltas(adapters.trained(model, dataclasses.replace(CONFIG, targets=targets)))
    assert {".".join(name.split(".")[3:]) for name in found} == wanted


def test_adapters_on_one_layer_that_stands_alone(tokens):
    plain = tiny.model(mixed_config(num_layers=2))
    config = dataclasses.replace(CONFIG, targets=("decoder.tail.1.*",))
    adapted = adapters.trained(plain, config)
    assert {name[:15] for name in lora.deltas(adapted)} == {"decoder.tail.1."}
    np.testing.assert_allclose(logits(lora.merge(adapted), tokens), logits(adapted, tokens), rtol=0, atol=TOLERANCE)


def test_a_target_that_describes_nothing_is_named_beside_what_there_is(model):
    with pytest.raises(ValueError, match=r"target 'atention.\*' describes no parameter .* decoder.period.0.attention"):
        lora.attach(model, dataclasses.replace(CONFIG, targets=("attention.*", "atention.*")))
    with pytest.raises(ValueError, match="none, is it laid out for decoding"):
        lora.attach(infer.prepare(model), CONFIG)


def test_vision_head_and_router_are_left_alone():
    model = tiny.model(tiny.vision_config())
    found = lora.deltas(adapters.trained(model, CONFIG))
    assert all(name.startswith("decoder.") and "router" not in name for name in found)


def test_what_would_lose_adapters_is_refused(adapted, tmp_path):
    with pytest.raises(ValueError, match="has adapters already; `merge` or `detach`"):
        lora.attach(adapted, CONFIG)
    with pytest.raises(ValueError, match="no place for .*lora_a.* merge adapters first"):
        adapted.unrolled()
    with pytest.raises(ValueError, match="lora_a"):
        checkpoint.save_hf(adapted, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
