"""`--set a.b=c` changes what it names, and says what it wanted when it cannot."""

import json

import pytest

from llama4_jax import config
from llama4_jax.config import presets


def test_override_replaces_one_field_and_leaves_the_rest():
    base = presets.scout()
    changed = config.apply(base, ["text.num_layers=8"])
    assert changed.text.num_layers == 8
    assert base.text.num_layers == 48
    assert config.apply(changed, ["text.num_layers=48"]) == base


def test_overrides_apply_in_order():
    assert config.apply(presets.tiny(), ["text.num_layers=3", "text.num_layers=5"]).text.num_layers == 5


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("text.norm_eps=1e-6", lambda c: c.text.norm_eps, 1e-6),
        ("text.context_length=10_485_760", lambda c: c.text.context_length, 10_485_760),
        ("text.tie_embeddings=true", lambda c: c.text.tie_embeddings, True),
        ("text.attention.qk_norm=False", lambda c: c.text.attention.qk_norm, False),
        ("text.attention.rope_scaling=None", lambda c: c.text.attention.rope_scaling, None),
        ("text.attention.rope_scaling.factor=4", lambda c: c.text.attention.rope_scaling.factor, 4.0),
        (" text.moe.top_k = 1 ", lambda c: c.text.moe.top_k, 1),
        ("bos_token=None", lambda c: c.bos_token, None),
        ("bos_token=7", lambda c: c.bos_token, 7),
        ("stop_tokens=(1, 2,3)", lambda c: c.stop_tokens, (1, 2, 3)),
        ("stop_tokens=()", lambda c: c.stop_tokens, ()),
    ],
)
def test_override_parses_the_type_of_the_field(assignment, read, value):
    got = read(config.apply(presets.tiny(), [assignment]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("text.num_layer=8", "no field 'num_layer'; did you mean 'num_layers'"),
        ("txet.num_layers=8", "no field 'txet'; did you mean 'text'"),
        ("text.attention.chunksize=8", "did you mean 'chunk_size'"),
        ("text.qqqq=1", "known fields: vocab_size, embed_dim"),
        ("text.num_layers", "no '='; write it as a.b=value"),
        ("text.num_layers=eight", "text.num_layers: wanted int, got 'eight'"),
        ("text.num_layers=8.5", "wanted int, got '8.5'"),
        ("text.tie_embeddings=maybe", "wanted bool, got 'maybe'"),
        ("bos_token=x", "wanted int or NoneType, got 'x'"),
        ("text.attention=8", "text.attention is a group; set one of its fields"),
        ("text.num_layers.more=8", "num_layers is 9, which has no field 'more'"),
        ("stop_tokens=(1,x)", "wanted int, got 'x'"),
    ],
)
def test_wrong_override_says_what_was_wanted(assignment, message):
    with pytest.raises(ValueError) as error:
        config.apply(presets.tiny(), [assignment])
    assert message in str(error.value)


def test_override_is_validated_like_any_other_value():
    with pytest.raises(ValueError, match="num_heads=4 is not divisible by num_kv_heads=3"):
        config.apply(presets.tiny(), ["text.attention.num_kv_heads=3"])


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=presets.PRESETS)
def test_round_trip_through_json_is_exact(preset):
    values = json.loads(json.dumps(config.to_dict(preset())))
    assert config.from_dict(config.Llama4Config, values) == preset()


def test_unknown_key_in_a_dict_is_refused():
    values = config.to_dict(presets.tiny())
    values["text"]["num_layer"] = values["text"].pop("num_layers")
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        config.from_dict(config.Llama4Config, values)
