"""Second moments of what each matrix multiplies, against what modules are seen to be given; coverage of experts."""

from __future__ import annotations

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import presets
from llama4_jax.config.lora import LoraConfig
from llama4_jax.config.quant import QuantRecipe, QuantSpec, int4_all
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import Llama4, lora
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.moe import Experts
from llama4_jax.quant import calibrate, matrices, moments, ptq, recipe
from llama4_jax.testing import tiny

ROUTERS = QuantRecipe(name="with routers", rules=(("router.kernel", QuantSpec(group=8)), *int4_all(8).rules))


def config(**changes):
    """Dense and mixture layers, chunked and global ones, one over; two experts a token, biases."""
    text = tiny.text_config().text
    attention = dataclasses.replace(text.attention, bias=True)
    moe = dataclasses.replace(presets.tiny().text.moe, step=2)
    text = dataclasses.replace(text, attention=attention, moe=moe, **changes)
    return dataclasses.replace(tiny.text_config(), text=text)


@pytest.fixture(scope="module")
def model() -> Llama4:
    return tiny.model(config(num_layers=3), scan=False)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], np.int32)
    return [{"tokens": rng.integers(0, 128, (2, 12)).astype(np.int32), "segments": segments} for _ in range(2)]


def seen_by_modules(model: Llama4, batches, monkeypatch) -> dict[str, list[np.ndarray]]:
    """Rows that each matrix multiplies, by the name of the parameter, in the order in which modules are called."""
    names = {id(leaf): name for name, leaf in matrices.listed(model).items()}
    seen: dict[str, list] = {}

    def keep(parameter, rows, *more):
        seen.setdefault(names[id(parameter.get_value())], []).append((rows, *more))

    linear, experts = Linear.__call__, Experts.__call__

    def watched_linear(self, x, dtype=None):
        keep(self.kernel, x)
        return linear(self, x, dtype)

    def watched_experts(self, rows, group_sizes):
        keep(self.gate_up, rows, group_sizes)
        return experts(self, rows, group_sizes)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", watched_linear)
        patch.setattr(Experts, "__call__", watched_experts)
        for batch in batches:
            model(batch["tokens"], segments=batch["segments"])
    return {name: [tuple(np.asarray(part) for part in call) for call in calls] for name, calls in seen.items()}


def exact(taken: list):
    """What changes no matrix, and keeps the moments that it is given, in the place of a way to round."""

    def keep(matrix, seen, spec, inputs):
        taken.append(np.asarray(seen))
        return QuantizedArray(jnp.asarray(matrix, jnp.float32), jnp.ones((1,) * matrix.ndim))

    return keep


def test_moments_are_those_of_what_each_module_is_given(model, batches, monkeypatch):
    specs, taken = recipe.specs(matrices.listed(model), ROUTERS), []
    names = []

    @dataclasses.dataclass(frozen=True)
    class Named(calibrate.Task):
        def rounded(self, name, matrix, seen):
            names.append(name)
            return super().rounded(name, matrix, seen)

    calibrate.walk(model, batches, Named(specs, exact(taken)))
    found = dict(zip([f"{name}.{names[:i].count(name)}" for i, name in enumerate(names)], taken))  # expert e is call e
    present = np.concatenate([batch["segments"].reshape(-1) != 0 for batch in batches])

    def check(name, rows):
        np.testing.assert_allclose(found.pop(name), rows.T @ rows, rtol=1e-4, atol=1e-4 * np.square(rows).max())

    for name, calls in seen_by_modules(model, batches, monkeypatch).items():
        if name.endswith("experts.gate_up"):
            for e in range(4):
                rows = [np.split(rows, np.cumsum(sizes))[e] for rows, sizes in calls]
                check(f"{name}.{e}", np.concatenate(rows))
                gate, up = np.einsum("rd,dgf->grf", np.concatenate(rows), np.asarray(matrices.listed(model)[name])[e])
                check(f"{name.replace('gate_up', 'down')}.{e}", gate / (1 + np.exp(-gate)) * up)
        elif name in specs:
            rows = np.concatenate([rows.reshape(24, -1) for (rows,) in calls])
            if name.endswith("shared.gate_up.kernel"):
                check(name.replace("shared.gate_up", "router") + ".0", rows[present])
            check(f"{name}.0", rows[present])
    assert not found, "moments of matrices that no module was seen to multiply with"


def test_experts_are_given_tokens_times_scores_and_starved_ones_more_of_them(model):
    router = model.decoder.tail[1].feed_forward.router
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


def test_stacked_layers_come_out_as_those_that_stand_alone(batches):
    stacked = tiny.model(config(num_layers=5))
    assert stacked.decoder.periods == 2 and len(stacked.decoder.tail) == 1
    models = [
        ptq.quantise(each, int4_all(8), method="gptq", calibration=batches) for each in (stacked, stacked.unrolled())
    ]
    held = matrices.quantised(models[0])
    assert held["decoder.period.1.feed_forward.experts.down"].shape == (2, 4, 24, 32)
    assert held["decoder.period.1.feed_forward.experts.down"].scales.shape == (2, 4, 3, 32)
    alone = matrices.quantised(models[1])
    for layer in range(5):
        home, index = (f"decoder.period.{layer % 2}.", layer // 2) if layer < 4 else ("decoder.tail.0.", ...)
        prefix = f"decoder.tail.{layer}."
        for name in [name for name in alone if name.startswith(prefix)]:
            values = held[home + name.removeprefix(prefix)].values[index]
            np.testing.assert_array_equal(values.astype(jnp.int8), alone[name].values.astype(jnp.int8), err_msg=name)


def test_later_layers_are_calibrated_behind_rounded_ones(model, batches):
    """Rounding the first layer alone changes what the last one is given."""
    specs = recipe.specs(matrices.listed(model), int4_all(8))
    last = {name: spec for name, spec in specs.items() if name.startswith("decoder.tail.2.")}
    plain, behind = [], []
    calibrate.walk(model, batches, calibrate.Task(last, exact(plain)))

    def rounded(matrix, seen, *more):
        behind.append(np.asarray(seen))
        return ptq._clipped(matrix, seen, *more)

    calibrate.walk(model, batches, calibrate.Task(specs, rounded))
    query, other = plain[0], behind[len(behind) - 1 - len(plain)]  # the unembedding came after
    assert np.abs(query - other).max() > 1e-3 * np.abs(query).max()


def test_coverage_counts_tokens_and_blind_experts_are_named(model, batches, caplog):
    tokens = sum(int(np.sum(batch["segments"] != 0)) for batch in batches)
    specs = recipe.specs(matrices.listed(model), int4_all(8))
    _, coverage = calibrate.walk(model, batches, calibrate.Task(specs, exact([])))
    assert coverage.chosen.keys() == {1} and coverage.chosen[1].sum() == 2 * tokens  # two experts a token
    np.testing.assert_array_equal(coverage.chosen[1], coverage.used[1])
    assert not caplog.records

    one = [{"tokens": batches[0]["tokens"][:1, :1]}]  # a token has two of four experts
    with caplog.at_level(logging.WARNING):
        _, coverage = ptq.calibrated(model, int4_all(8), one)
    assert (
        coverage.starved() == [(1, e) for e in range(4) if coverage.chosen[1][e] == 0] and len(coverage.starved()) == 2
    )
    assert "no calibration token for 2 experts" in caplog.text
    _, coverage = ptq.calibrated(model, int4_all(8), batches, extra_tokens=tokens)
    assert np.all(coverage.used[1] == tokens) and not coverage.starved()
    assert coverage.table().splitlines()[1].split()[0] == "1" and coverage.to_dict()["1"]["used"] == [tokens] * 4


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
