"""What describes adapters: scale, patterns, and what is refused."""

import pytest

from llama4_jax.config.lora import ATTENTION, DENSE, ROUTED_EXPERTS, SHARED_EXPERTS, LoraConfig, matches

NAMES = [
    "decoder.tail.0.attention.query.kernel",
    "decoder.tail.0.feed_forward.gate_up.kernel",
    "decoder.period.1.feed_forward.shared.gate_up.kernel",
    "decoder.period.1.feed_forward.experts.gate_up",
    "decoder.period.1.feed_forward.router.kernel",
]


def test_the_scale_is_alpha_by_rank_or_by_its_root():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (ATTENTION, [0]),
        (DENSE, [1]),
        (SHARED_EXPERTS, [2]),
        (ROUTED_EXPERTS, [3]),
        (("decoder.tail.0.*",), [0, 1]),
        (("query.kernel",), [0]),
        (("uery.kernel",), []),
        (("*",), [0, 1, 2, 3, 4]),
    ],
)
def test_a_pattern_is_for_the_end_of_a_name(patterns, found):
    assert [i for i, name in enumerate(NAMES) if any(matches(name, pattern) for pattern in patterns)] == found


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}])
def test_rank_and_alpha_must_be_positive(wrong):
    with pytest.raises(ValueError, match="rank=.* alpha=.* must be positive"):
        LoraConfig(**wrong)


@pytest.mark.parametrize("targets", [(), "attention.*"])
def test_targets_are_a_tuple_of_patterns(targets):
    with pytest.raises(ValueError, match="wanted a tuple of one pattern or more"):
        LoraConfig(targets=targets)
