"""Generation with the cache against whole forward passes without one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from llama4_jax import infer
from llama4_jax.nn.linear import Linear, MatrixLinear
from llama4_jax.nn.moe import Experts, MatrixExperts
from llama4_jax.testing import tiny

NEW = 6  # from prompts of 3 and 7 tokens: over borders of chunks of 4
PROMPTS = [[5, 17, 90], [3, 1, 4, 1, 5, 9, 2]]
ROOM = 24  # tokens of the forward passes compared with; fixed, so that one program serves all


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.text_config(num_layers=3))


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    return infer.generate(model, PROMPTS, max_new_tokens=NEW)


@jax.jit
def forward(model, tokens, segments, images):
    return model(tokens, images, segments=segments).logits


def by_repeated_forward(model, prompt: list[int], count: int, images=None) -> list[int]:
    """Greedy continuation, the whole text from the start for each new token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, ROOM), np.int32) + 1  # on the right, where nothing before can see it
        padded[0, : len(tokens)] = tokens
        segments = (np.arange(ROOM) < len(tokens)).astype(np.int32)[None]
        tokens.append(int(jnp.argmax(forward(model, padded, segments, images)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_takes_the_likeliest_token_of_a_whole_forward_pass(model, greedy):
    for prompt, found in zip(PROMPTS, greedy):
        assert found == by_repeated_forward(model, prompt, NEW)


@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_for_decoding_changes_no_logits(tied):
    config = tiny.text_config(num_layers=1)
    attention = dataclasses.replace(config.text.attention, bias=not tied)
    moe = dataclasses.replace(config.text.moe, top_k=2)
    text = dataclasses.replace(config.text, attention=attention, moe=moe, tie_embeddings=tied)
    plain = tiny.model(dataclasses.replace(config, text=text))
    prepared = infer.prepare(plain)
    assert jax.tree.structure(infer.prepare(prepared)) == jax.tree.structure(prepared)
    for shape in [(1, 1), (3, 2), (2, ROOM)]:  # one row, a few, and more than are multiplied apart
        tokens = jax.random.randint(jax.random.key(0), shape, 0, 128)
        wanted, got = (forward(model, tokens, jnp.ones_like(tokens), None) for model in (plain, prepared))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(("platform", "found"), [("tpu", {MatrixLinear, MatrixExperts}), ("gpu", {Linear, Experts})])
def test_floats_become_matrices_where_they_lie_in_another_order(platform, found):
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    model = jax.eval_shape(lambda: tiny.model(tiny.text_config(num_layers=1)))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        prepared = jax.eval_shape(infer.prepare, model)
    kinds = (MatrixLinear, MatrixExperts, Linear, Experts)
    nodes = jax.tree.leaves(prepared, is_leaf=lambda node: type(node) in kinds)
    assert {type(node) for node in nodes} & set(kinds) == found


def test_generate_returns_plain_lists_of_the_length_asked_for(greedy):
    assert [len(row) for row in greedy] == [NEW, NEW]
    assert all(type(token) is int for row in greedy for token in row)


def test_a_stream_gives_the_ids_of_generate_one_by_one(model, greedy):
    stream = infer.stream(model, PROMPTS[1], max_new_tokens=NEW)
    assert next(stream) == greedy[1][0]
    assert list(stream) == greedy[1][1:]


def test_a_row_ends_after_a_stop_token_and_the_others_go_on(model, greedy):
    stop = (greedy[0][2], 127)
    found = infer.generate(model, PROMPTS, max_new_tokens=NEW, stop=stop)
    for row, whole in zip(found, greedy):
        ends = [i + 1 for i, token in enumerate(whole) if token in stop]
        assert row == whole[: ends[0] if ends else NEW]
    assert found[0][-1] == stop[0]
    assert len(found[0]) <= 3
    assert list(infer.stream(model, PROMPTS[0], max_new_tokens=NEW, stop=stop)) == found[0]


def test_draws_repeat_with_the_seed_and_stream_alike(model):
    sampler = infer.Sampler(temperature=3.0, top_k=50, top_p=0.95)
    options = {"max_new_tokens": NEW, "sampler": sampler}
    first, again, other = (infer.generate(model, PROMPTS[:1], **options, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert list(infer.stream(model, PROMPTS[0], **options, seed=1)) == first[0]


PATCHES = [0] * 4
PICTURE_PROMPTS = [[7, 8], [1, 2, *PATCHES, 3, *PATCHES, 4]]


@pytest.fixture(scope="module")
def seeing():
    """Its placeholder has id 0, which padding would take if nobody thought of it."""
    return tiny.model(tiny.vision_config(patch_token=0))


@pytest.fixture(scope="module")
def tiles() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1, maxval=1)


def test_pictures_are_seen_and_padding_is_never_a_placeholder(seeing, tiles):
    found = infer.generate(seeing, PICTURE_PROMPTS, max_new_tokens=NEW, images=tiles)
    assert found[0] == by_repeated_forward(seeing, PICTURE_PROMPTS[0], NEW, tiles)  # both tiles surplus: unused
    assert found[1] == by_repeated_forward(seeing, PICTURE_PROMPTS[1], NEW, tiles)
    swapped = infer.generate(seeing, PICTURE_PROMPTS, max_new_tokens=NEW, images=tiles[::-1])
    assert swapped[0] == found[0]
    assert swapped[1] != found[1]


def test_placeholders_and_tiles_must_agree(seeing, tiles):
    with pytest.raises(ValueError, match="8 patch placeholders .* 4 image features"):
        infer.generate(seeing, PICTURE_PROMPTS, max_new_tokens=1, images=tiles[:1])
    with pytest.raises(ValueError, match="8 patch placeholders .* 0 image features"):
        infer.generate(seeing, PICTURE_PROMPTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="0 patch placeholders .* 8 image features"):
        infer.generate(seeing, PICTURE_PROMPTS[:1], max_new_tokens=1, images=tiles)


def test_a_text_model_refuses_pictures(model, tiles):
    with pytest.raises(ValueError, match="no vision tower"):
        infer.generate(model, PROMPTS, max_new_tokens=1, images=tiles)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 1, "at least one prompt and one new token, got 0 and 1"),
        ([[1]], 0, "at least one prompt and one new token, got 1 and 0"),
        ([[1], []], 1, "prompt 1 is empty; start it with the model's begin-of-text token"),
        ([[1], [2, 128]], 1, r"prompt 1 has ids outside 0 \.\. 127"),
        ([[-1]], 1, r"prompt 0 has ids outside 0 \.\. 127"),
        ([[1] * 100], 3997, "prompt 0 has 100 tokens; with 3997 new ones it exceeds context_length=4096"),
    ],
    ids=["no prompts", "no tokens", "empty", "id too large", "id too small", "too long"],
)
def test_what_cannot_be_generated_is_refused(model, prompts, count, message):
    with pytest.raises(ValueError, match=message):
        infer.generate(model, prompts, max_new_tokens=count)
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            list(infer.stream(model, prompts[0], max_new_tokens=count))
