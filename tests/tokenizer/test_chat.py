"""Dialogues: the reference's tokens, loss masks, pictures, and the way back."""

import base64
import io
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama4_jax.data import images
from llama4_jax.tokenizer import chat

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_chat.json").read_text())
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "SF"}'}}


def _expanded(tokens):
    """The golden files keep a run of one token as [token, count]."""
    return [token for run in tokens for token in ([run] if isinstance(run, int) else [run[0]] * run[1])]


def _said(tok, dialog):
    return tok.decode(token for token, said in zip(dialog.tokens, dialog.loss_mask, strict=True) if said)


@pytest.mark.parametrize("name", GOLDEN["dialogs"])
def test_dialogues_have_the_tokens_of_the_reference(llama4, name):
    golden = GOLDEN["dialogs"][name]
    dialog = chat.encode_dialog(llama4, golden["messages"], tool_style=golden.get("tool_style", "json"))
    assert dialog.tokens == _expanded(golden["tokens"])


def test_the_shared_dialogues_are_the_committed_ones(root, llama4):
    path = root.parent / "shared" / "reference" / "golden_chat.json"
    if not path.exists():
        pytest.skip("the reference goldens are not beside this checkout")
    shared = json.loads(path.read_text())["dialogs"]
    raw = shared.pop("raw_completion")["tokens"]
    assert {name: golden["tokens"] for name, golden in shared.items()} == {
        name: _expanded(golden["tokens"]) for name, golden in GOLDEN["dialogs"].items()
    }
    assert llama4.encode("The capital of France is", bos=True) == raw


@pytest.mark.parametrize("name", GOLDEN["dialogs"])
def test_decoding_a_reference_dialogue_gives_its_messages(llama4, name):
    golden = GOLDEN["dialogs"][name]
    messages = chat.decode_dialog(llama4, _expanded(golden["tokens"]))
    assert json.loads(json.dumps(messages)) == golden["messages"]


def test_the_loss_covers_what_the_assistant_says_and_its_ends(tok):
    dialog = chat.encode_dialog(
        tok,
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "Looking. ", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": '{"t": 20}'},
            {"role": "assistant", "content": "20 degrees"},
            {"role": "user", "content": "thanks"},
        ],
    )
    call = '{"type": "function", "name": "get_weather", "parameters": {"city": "SF"}}'
    assert _said(tok, dialog) == f"Looking. {call}<|eom|>20 degrees<|eot|>"
    assert len(dialog.loss_mask) == len(dialog.tokens)


def test_thoughts_come_first_and_are_learnt(llama4):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "add", "content": "4"}]
    dialog = chat.encode_dialog(llama4, messages)
    assert _said(llama4, dialog) == "<|reasoning_thinking_start|>add<|reasoning_thinking_end|>4<|eot|>"
    assert chat.decode_dialog(llama4, dialog.tokens) == messages
    cut = dialog.tokens[: dialog.tokens.index(llama4.special["reasoning_thinking_end"])]
    assert chat.decode_dialog(llama4, cut)[-1] == {"role": "assistant", "reasoning_content": "add", "content": ""}


def test_thoughts_need_a_tokenizer_that_has_their_tokens(tok):
    with pytest.raises(ValueError, match=r"message 0: .* no <\|reasoning_thinking_start\|>"):
        chat.encode_dialog(tok, [{"role": "assistant", "reasoning_content": "hm", "content": "4"}])


def test_the_generation_prompt_is_there_unless_the_assistant_spoke_last_or_as_asked(tok):
    asked = [{"role": "user", "content": "fox"}]
    answered = [*asked, {"role": "assistant", "content": "dog"}]
    header = "<|header_start|>assistant<|header_end|>\n\n"
    text = {
        (len(messages), prompt): tok.decode(chat.encode_dialog(tok, messages, add_generation_prompt=prompt).tokens)
        for messages in (asked, answered)
        for prompt in (None, True, False)
    }
    ends = {key for key, value in text.items() if value.endswith(header)}
    assert ends == {(1, None), (1, True), (2, True)}
    assert text[2, None] == text[1, None] + "dog<|eot|>"


def test_several_pictures_in_a_turn_keep_their_order_and_grids(tok):
    url = "data:image/png;base64," + base64.b64encode(b"second").decode()
    content = [
        {"type": "text", "text": "left"},
        {"type": "image", "image": "first"},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image", "image": "third", "grid": (1, 1)},
        {"type": "text", "text": "right"},
    ]
    grids = {"first": (1, 2), b"second": (2, 1)}
    messages = [{"role": "user", "content": content}]
    dialog = chat.encode_dialog(
        tok, messages, tile=lambda picture: (f"tiles of {picture}", grids[picture]), tokens_per_tile=2
    )
    assert dialog.images == ["tiles of first", "tiles of b'second'", "third"]
    patches = "<|patch|><|patch|>"
    whole = f"<|image|>{patches}<|image_end|>"
    assert tok.decode(dialog.tokens).split("\n\n")[1] == (
        f"left<|image_start|>{patches}<|tile_x_separator|>{patches}<|tile_y_separator|>{whole}"
        f"<|image_start|>{patches}<|tile_y_separator|>{patches}<|tile_y_separator|>{whole}"
        f"<|image_start|>{whole}right<|eot|><|header_start|>assistant<|header_end|>"
    )
    (decoded,) = chat.decode_dialog(tok, dialog.tokens)
    assert [part.get("grid") or part["text"] for part in decoded["content"]] == [
        "left",
        (1, 2),
        (2, 1),
        (1, 1),
        "right",
    ]
    assert not any(dialog.loss_mask)


def test_an_encoded_picture_is_cut_by_the_tiler_that_is_passed(tok):
    file = io.BytesIO()
    Image.new("RGB", (512, 400)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    dialog = chat.encode_dialog(tok, messages, tile=lambda picture: images.tile(images.read(picture)))
    assert [tiles.shape for tiles in dialog.images] == [(5, 336, 336, 3)]
    assert dialog.tokens.count(tok.special["patch"]) == 5 * 144


special_text = st.sampled_from(
    [
        "<|eot|>",
        "<|header_start|>system<|header_end|>\n\n",
        "<|patch|>",
        "<|python_start|>",
        '{"name": "f"}',
        "[f(a=1)]",
    ]
)
text = st.text(max_size=12) | special_text | st.builds("{}{}".format, special_text, st.text(max_size=5))
part = st.builds(lambda text: {"type": "text", "text": text}, text.filter(bool)) | st.builds(
    lambda rows, columns: {"type": "image", "grid": (rows, columns)}, st.integers(1, 3), st.integers(1, 3)
)
heard = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "tool"]), text)
seen = st.builds(lambda content: {"role": "user", "content": content}, st.lists(part, min_size=1, max_size=4))
said = st.builds(lambda content: {"role": "assistant", "content": content}, text)
arguments = st.dictionaries(st.text(max_size=5), text | st.integers() | st.lists(st.booleans()), max_size=2)
called = st.builds(
    lambda all_arguments: {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": json.dumps(one, ensure_ascii=False)}}
            for one in all_arguments
        ],
    },
    st.lists(arguments, min_size=1, max_size=3),
)


def _arguments(message):
    return [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", ())]


@settings(max_examples=300, deadline=None)
@given(
    messages=st.lists(heard | seen | said | called, min_size=1, max_size=5), style=st.sampled_from(["json", "pythonic"])
)
def test_decoding_undoes_encoding_and_no_content_forges_structure(tok, messages, style):
    dialog = chat.encode_dialog(tok, messages, tokens_per_tile=2, tool_style=style)
    decoded = chat.decode_dialog(tok, dialog.tokens)
    again = chat.encode_dialog(
        tok, decoded, add_generation_prompt=messages[-1]["role"] != "assistant", tokens_per_tile=2, tool_style=style
    )
    assert [message["role"] for message in decoded] == [message["role"] for message in messages]
    for message, original in zip(decoded, messages, strict=True):
        assert _arguments(message) == _arguments(original)
        if isinstance(original["content"], str):
            assert message["content"] == original["content"]
    assert tok.decode(again.tokens) == tok.decode(dialog.tokens)
    assert dialog.tokens.count(tok.special["header_start"]) == len(messages) + (messages[-1]["role"] != "assistant")


def test_an_unfinished_answer_is_a_message_and_padding_is_not(tok):
    prompt = chat.encode_dialog(tok, [{"role": "user", "content": "fox"}]).tokens
    answer = {"role": "assistant", "content": "dog"}
    assert chat.decode_dialog(tok, prompt + tok.encode("dog"))[1:] == [answer]
    assert chat.decode_dialog(tok, prompt + tok.encode("dog") + [tok.eos])[1:] == [answer]
    assert chat.decode_dialog(tok, [*prompt, *tok.encode("dog"), tok.special["eot"], tok.pad, tok.pad])[1:] == [answer]


def _user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (
            [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}],
            "message 1: it has role='robot'; wanted",
        ),
        (["hello"], "message 0: it has role=None"),
        ([{"role": "user"}], '"content" is missing'),
        ([{"role": "assistant", "content": None}], '"content" is missing'),
        ([{"role": "tool", "content": {"t": 20}}], '"content" is dict; wanted a text'),
        (_user({"type": "audio"}), "a part has type 'audio'"),
        (_user("text"), "a part has type None"),
        (_user({"type": "text"}), 'needs a "text"'),
        (_user({"type": "image"}), 'needs an "image" or a "grid"'),
        (_user({"type": "image", "image": b"x"}), "pass tile="),
        (_user({"type": "image", "grid": (0, 1)}), "at least 1 of each"),
        (_user({"type": "image", "grid": 3}), r"wanted its \(rows, columns\)"),
        (_user({"type": "image_url", "image_url": {}}), 'needs {"image_url"'),
        (_user({"type": "image_url", "image_url": {"url": "http://a/b.png"}}), "is not fetched from here"),
        (_user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "is not fetched from here"),
        (
            _user({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}),
            "data: URL that cannot be read",
        ),
        (_user({"type": "image_url", "image_url": {"url": "data:,x"}}), "is not in base64"),
        ([{"role": "assistant", "content": [{"type": "image", "grid": (1, 1)}]}], "an assistant says no pictures"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "only the assistant has tool_calls"),
        ([{"role": "user", "content": "a", "reasoning_content": "b"}], "only the assistant has reasoning_content"),
        ([{"role": "assistant", "content": "a", "reasoning_content": 3}], "wanted a text"),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], '"tool_calls" is dict; wanted a list'),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "needs an object"),
    ],
)
def test_a_malformed_message_is_refused_with_its_place_and_reason(tok, messages, reason):
    with pytest.raises(ValueError, match=reason):
        chat.encode_dialog(tok, messages)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fox", "token 0: wanted a message's header, got 'fox"),
        ("<|header_start|>user", "wanted a message's header"),
        ("<|header_start|>user<|header_end|>fox<|eot|>", "wanted a message's header"),
        ("<|header_start|>robot<|header_end|>\n\nfox<|eot|>", "the header names 'robot'"),
        (
            "<|header_start|>user<|header_end|>\n\n<|image_start|><|image|><|image_end|><|eot|>",
            "are no picture: 0 patches",
        ),
        ("<|header_start|>user<|header_end|>\n\n<|image_start|><|image|><|patch|><|eot|>", "are no picture"),
    ],
)
def test_tokens_that_are_no_dialogue_are_refused(tok, text, reason):
    with pytest.raises(ValueError, match=reason):
        chat.decode_dialog(tok, tok.encode(text, allow_special=True))
