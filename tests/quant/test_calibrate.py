"""Second moments of what each matrix multiplies, against what modules are seen to be given; coverage of experts."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config.lora import LoraConfig
from llama4_jax.config.quant import QuantRecipe, QuantSpec, int4_all
from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import Llama4, lora
from llama4_jax.nn import mlp
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.moe import Experts
from llama4_jax.quant import calibrate, matrices, moments, ptq, recipe
from llama4_jax.testing import tiny

ROUTERS = QuantRecipe(name="with routers", rules=(("router.kernel", QuantSpec(group=8)), *int4_all(8).rules))


@pytest.fixture(scope="module")
def model() -> Llama4:
    """Two periods of a chunked dense layer and a global mixture; two experts a token, biases."""
    text = tiny.text_config().text
    attention = dataclasses.replace(text.attention, bias=True)
    moe = dataclasses.replace(text.moe, step=2)
    text = dataclasses.replace(text, num_layers=4, attention=attention, moe=moe)
    return tiny.model(dataclasses.replace(tiny.text_config(), text=text))


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], np.int32)
    return [{"tokens": rng.integers(0, 128, (2, 12)).astype(np.int32), "segments": segments} for _ in range(2)]


def seen_by_modules(model: Llama4, batch) -> dict[str, tuple]:
    """What each matrix of a model of layers that stand alone multiplies, as its module is called; by the parameter's name."""

    def run(model, batch):
        named, seen = {id(leaf): name for name, leaf in names.held(model).items()}, {}
        linear, experts = Linear.__call__, Experts.__call__

        def watched_linear(self, x, *more, **options):
            seen[named[id(self.kernel.get_value())]] = (x,)
            return linear(self, x, *more, **options)

        def watched_experts(self, rows, group_sizes):
            seen[named[id(self.gate_up.get_value())]] = (rows, group_sizes)
            return experts(self, rows, group_sizes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Linear, "__call__", watched_linear)
            patch.setattr(Experts, "__call__", watched_experts)
            # Nothing seen inside of jax.checkpoint may leave it.
            patch.setattr(mlp, "gated", lambda down, gate_up: down(mlp.swiglu(gate_up)))
            model(batch["tokens"], segments=batch["segments"])
        return seen

    return jax.tree.map(np.asarray, jax.jit(run)(model, batch))


def exact(taken: list, factor: float = 1.0):
    """Stands for a way to round: keeps the moments that it is given, and multiplies the matrix."""

    def keep(matrix, seen, spec, inputs):
        taken.append(np.asarray(seen))
        return QuantizedArray(jnp.asarray(matrix, jnp.float32), jnp.full((1,) * matrix.ndim, factor))

    return keep


def test_moments_are_those_of_what_each_module_is_given_and_stacks_keep_their_order(model, batches):
    specs, calls, taken = recipe.specs(names.held(model), ROUTERS), [], []

    @dataclasses.dataclass(frozen=True)
    class Named(calibrate.Task):
        def rounded(self, name, matrix, seen):
            calls.append(name)
            return super().rounded(name, matrix, seen)

    made, _ = calibrate.walk(model, batches, Named(specs, exact(taken)))
    assert matrices.quantised(made).keys() == specs.keys()
    for name, leaf in matrices.quantised(made).items():
        np.testing.assert_array_equal(leaf.values, names.held(model)[name], err_msg=name)

    assert model.decoder.periods == 2
    found = {name: [moments for call, moments in zip(calls, taken) if call == name] for name in specs}
    alone = model.unrolled()
    weights, seen = names.held(alone), [seen_by_modules(alone, batch) for batch in batches]

    def check(name: str, rows: np.ndarray) -> None:  # of a layer's parameter; layers and experts come in their order
        layer, rest = int(name.split(".")[2]) if name != "head.kernel" else 0, name.split(".", 3)[-1]
        wanted = rows.T @ rows
        moments = found[name if name == "head.kernel" else f"decoder.period.{layer % 2}.{rest}"].pop(0)
        np.testing.assert_allclose(moments, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)

    for name in seen[0]:
        if name.endswith("experts.gate_up"):
            for e in range(4):
                parts = [np.split(rows, np.cumsum(sizes))[e] for rows, sizes in (each[name] for each in seen)]
                check(name, np.concatenate(parts))
                gate, up = np.einsum("rd,dgf->grf", np.concatenate(parts), np.asarray(weights[name])[e])
                check(name.replace("gate_up", "down"), gate / (1 + np.exp(-gate)) * up)
        else:
            rows = [
                each[name][0].reshape(24, -1)[batch["segments"].reshape(-1) != 0] for each, batch in zip(seen, batches)
            ]
            check(name, np.concatenate(rows))
            if name.endswith("shared.gate_up.kernel"):
                check(name.replace("shared.gate_up", "router"), np.concatenate(rows))
    assert not any(found.values()), "moments of matrices that no module was seen to multiply with"


def test_experts_are_given_tokens_times_scores_and_starved_ones_more_of_them(model):
    router = calibrate._place(model, 1)[1].feed_forward.router
    rows = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    logits = rows @ np.asarray(router.kernel[...])
    top, scores = np.argsort(-logits, axis=1)[:, :2], 1 / (1 + np.exp(-logits))
    assert np.median(scores) < 0.9  # so that leaving them out would be seen
    for e, (inputs, number) in enumerate(moments.of_experts(router, rows, extra_tokens=15)):
        tokens = [t for t in range(20) if e in top[t]]
        others = sorted((t for t in range(20) if e not in top[t]), key=lambda t: -logits[t, e])
        assert number == len(tokens)
        chosen = tokens + others[: max(15 - number, 0)]
        np.testing.assert_allclose(inputs, rows[chosen] * scores[chosen, e][:, None], rtol=1e-5)


def test_later_layers_are_calibrated_behind_rounded_ones(model, batches):
    specs = recipe.specs(names.held(model), int4_all(8))
    mixtures = {name: spec for name, spec in specs.items() if name.startswith("decoder.period.1.")}
    plain, behind = [], []
    calibrate.walk(model, batches, calibrate.Task(mixtures, exact(plain)))
    made, _ = calibrate.walk(model, batches, calibrate.Task(specs, exact(behind, factor=0.9)))
    query, other = plain[0], behind[6]  # after the six matrices of the dense layer before
    assert np.abs(query - other).max() > 1e-2 * np.abs(query).max()
    # What the unembedding is given is what all of the rounded layers make of the text.
    last = jax.jit(lambda model, batch: model.hidden(batch["tokens"], segments=batch["segments"]).hidden)
    rows = moments.present([last(made, batch) for batch in batches], [batch["segments"] for batch in batches])
    np.testing.assert_allclose(behind[-1], rows.T @ rows, rtol=1e-3, atol=1e-4 * np.abs(behind[-1]).max())


def test_coverage_counts_tokens_and_blind_experts_are_named(model, batches, caplog):
    tokens = sum(int(np.sum(batch["segments"] != 0)) for batch in batches)
    specs = recipe.specs(names.held(model), int4_all(8))

    def coverage(batches, extra_tokens=0):
        return calibrate.walk(model, batches, calibrate.Task(specs, exact([]), extra_tokens))[1]

    found = coverage(batches)
    assert found.chosen.keys() == {1, 3} and found.chosen[1].sum() == 2 * tokens  # two experts a token
    np.testing.assert_array_equal(found.chosen[3], found.used[3])
    assert not caplog.records

    found = coverage(batches, extra_tokens=tokens)
    assert np.all(found.used[1] == tokens) and not found.starved() and found.starved(tokens + 1)
    assert found.table().splitlines()[1].split()[0] == "1" and found.to_dict()["3"]["used"] == [tokens] * 4

    one = batches[0] | {"segments": np.zeros((2, 12), np.int32)}
    one["segments"][0, 0] = 1
    with caplog.at_level(logging.WARNING):
        found = coverage([one])  # the one token goes to two of four experts
    assert found.starved() == [(layer, e) for layer in (1, 3) for e in range(4) if found.chosen[layer][e] == 0]
    assert len(found.starved()) == 4 and "no calibration token for 4 experts" in caplog.text


def test_what_cannot_be_calibrated_is_refused(model, batches):
    table = QuantRecipe(name="table", rules=(("embed.table", QuantSpec(group=8)),))
    with pytest.raises(NotImplementedError, match="no calibration inputs for embed.table"):
        ptq.quantise(model, table, method="clip", calibration=batches)
    with pytest.raises(NotImplementedError, match="merge them first"):
        adapted = lora.attach(model, LoraConfig(rank=2))
        ptq.quantise(adapted, int4_all(8), method="gptq", calibration=batches)
    with pytest.raises(ValueError, match="no text"):
        ptq.quantise(model, int4_all(8), method="gptq", calibration=[])
    with pytest.raises(ValueError, match="wants calibration"):
        ptq.quantise(model, int4_all(8), method="gptq")
    with pytest.raises(ValueError, match="uses no calibration"):
        ptq.quantise(model, int4_all(8), method="rtn", calibration=batches)
