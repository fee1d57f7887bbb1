"""Tool calls: all forms are read, what is written is read back, and damage stays text with its reason."""

import json
import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama4_jax.tokenizer import tool_calls
from llama4_jax.tokenizer.tool_calls import Parsed, ToolCall

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_chat.json").read_text())

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[a-z_][A-Za-z0-9_]{0,9}(\.[a-z]{2,5}[0-9])?", fullmatch=True).map("tool_".__add__)
argument_names = st.text() | st.sampled_from(
    ["from", "class", "city", "my-key", "from__as_name", "ﬁ", "__debug__", "self", "é"]
)
calls = st.lists(
    st.builds(ToolCall, names, st.dictionaries(argument_names, values, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(
    calls=calls,
    style=st.sampled_from(["json", "pythonic", "function"]),
    end=st.sampled_from(["", "<|eom|>", "<|eot|>"]),
)
@example(calls=[ToolCall("f", {"from": "a", "": {"ﬁ": [1e22, -0.5, -7]}})], style="pythonic", end="<|eot|>")
@example(calls=[ToolCall("f", {"a": "</function>"}), ToolCall("g", {})], style="function", end="")
def test_what_is_written_is_read_back(calls, style, end):
    written = tool_calls.render(calls, style)
    expected = Parsed(tuple(calls), "")
    assert tool_calls.parse(written + end) == expected
    assert tool_calls.parse(f"<|python_start|>{written}<|python_end|>{end}") == expected


@pytest.mark.parametrize("text", GOLDEN["parse"])
def test_texts_are_read_as_the_reference_reads_them(text):
    """Of several calls the reference returns the first alone, so only that one is compared with it."""
    golden, parsed = GOLDEN["parse"][text], tool_calls.parse(text)
    first = [{"name": call.name, "args": call.arguments} for call in parsed.calls[:1]]
    assert first == golden["calls"]
    assert parsed.text == golden["content"] and parsed.reason is None


def test_all_parallel_calls_are_returned():
    text = '[get_weather(city="San Francisco"), get_weather(city="Seattle")]<|eot|>'
    assert [call.arguments["city"] for call in tool_calls.parse(text).calls] == ["San Francisco", "Seattle"]


@pytest.mark.parametrize(
    "text",
    [
        '[f(a=1), g(b="x, ]")]',
        '{"name": "f", "parameters": {"a": 1}}{"name": "g", "parameters": {"b": "x, ]"}}',
        '{"name": "f", "arguments": {"a": 1}}; {"type": "function", "name": "g", "parameters": {"b": "x, ]"}}',
        '[{"name": "f", "arguments": "{\\"a\\": 1}"}, {"function": {"name": "g", "arguments": {"b": "x, ]"}}}]',
        '<function=f>{"a": 1}</function>\n<function=g>{"b": "x, ]"}</function>',
        '  <|python_start|>[f(a=1), g(b="x, ]")]<|python_end|><|eom|>',
        '<|python_start|>[f(a=1), g(b="x, ]")]<|eot|>',
    ],
)
def test_every_form_holds_the_same_two_calls(text):
    assert tool_calls.parse(text) == Parsed((ToolCall("f", {"a": 1}), ToolCall("g", {"b": "x, ]"})), "")


def test_nested_values_unicode_and_mixed_spellings_are_read():
    text = "[book(où={'ville': 'Köln', 'étages': [1, -2.5, (True, None)]}, wait=false, **{'from': \"赤\"})]"
    (call,) = tool_calls.parse(text).calls
    assert call.arguments == {"où": {"ville": "Köln", "étages": [1, -2.5, [True, None]]}, "wait": False, "from": "赤"}


def test_arguments_named_by_words_that_python_keeps_are_read():
    (call,) = tool_calls.parse("[mail(from='class=a', class = \"it's in=b\", to='c', **{'from__as_name': 1})]").calls
    assert call.arguments == {"from": "class=a", "class": "it's in=b", "to": "c", "from__as_name": 1}


def test_text_between_python_tokens_beside_a_call_is_kept():
    text = '<|python_start|>Let me look.<|python_end|>{"name": "f", "parameters": {}}<|eot|>'
    assert tool_calls.parse(text) == Parsed((ToolCall("f", {}),), "Let me look.")


@pytest.mark.parametrize(
    "text", ["plain", "", "[1, 2]", '["a"]', "[]", '{"a": 1}', "print('[f(a=1)]')", "see [f(a=1)]"]
)
def test_plain_text_lists_and_objects_are_no_calls(text):
    assert tool_calls.parse(text + "<|eot|>") == Parsed((), text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[f(a=1", "never closed"),
        ("[f(1)]", "arguments without a name"),
        ("[f(a=1, a=2)]", "'a' twice"),
        ("[f(a=1, **{'a': 2})]", "'a' twice"),
        ("[f(a=__import__('os').system('true'))]", "a Call is no literal"),
        ("[f(a=1+1)]", "a BinOp is no literal"),
        ("[f(a=f'{1}')]", "a JoinedStr is no literal"),
        ("[f(a={1: 2})]", "key that is no text"),
        ("[f(**a)]", "a Name is no literal"),
        ("[f(a=1), 2]", "a Constant beside calls"),
        ("[(lambda: 0)()]", "a Lambda is called"),
        ("[f(a=1)] and more", "no list of calls"),
        ("[f(a=1)] or so, said he", "invalid syntax"),
        ('{"name": "f", "parameters": [1]}', "needs an object"),
        ('{"name": "f"}', "needs an object"),
        ('{"name": 3, "parameters": {}}', "needs a name"),
        ('{"name": "f", "type": "code", "parameters": {}}', 'of type "function"'),
        ('{"name": "f", "parameters": {"a": NaN}}', "NaN is not a JSON value"),
        ('{"name": "f", "parameters": {}', "looks like a call"),
        ('<function=f>{"a": 1}', "</function> is wanted"),
        ("<function=f>{'a': 1}</function>", "looks like a call"),
        ("<function=>{}</function>", "<function=name> is wanted"),
        ("<function=f>[1]</function>", "needs an object"),
        ("x.call(query=)", "looks like a call"),
        ("<|python_start|>a<|python_end|>b", "behind <|python_end|>"),
    ],
)
def test_a_damaged_call_stays_text_with_its_reason(text, reason):
    parsed = tool_calls.parse(text + "<|eom|>")
    assert (parsed.calls, parsed.text) == ((), text)
    assert reason in parsed.reason


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[f(a=" + "[" * 50_000 + "]" * 50_000 + ")]",
        "[f(a=" + "-" * 100_000 + "1)]",
        "[f(a=" + "1+" * 100_000 + "1)]",
        "[f" + ".a" * 100_000 + "(a=1)]",
        "[" + "f(a=" * 5_000 + ")" * 5_000 + "]",
        "[f(a=" + "9" * 100_000 + ")]",
        '{"name": "f", "parameters": {"a": ' + "9" * 100_000 + "}}",
        '{"name": "f", "parameters": ' + '{"a": ' * 100_000,
        "<function=f>" + "[" * 100_000,
        "[f(from=1, a='" + '\\"' * 400_000,
        "[f(a='\x00')]",
        "[f(a='\ud800')]",
        "[" + "f(a=1), " * 200_000 + "]",
    ],
    ids=lambda text: text[:12].encode("ascii", "backslashreplace").decode(),
)
def test_depth_size_and_bad_characters_give_a_reason_and_no_exception(text):
    parsed = tool_calls.parse(text)
    assert (parsed.calls, parsed.text) == ((), text)
    assert parsed.reason


pieces = st.sampled_from(
    ["[", "]", "(", ")", "{", "}", "f", "=", ",", ":", '"', "'", "1", "-", "**", "name", '{"name": "f", "parameters": {',
     "<function=f>", "</function>", "<|python_start|>", "<|python_end|>", "<|eot|>", " ", "\n", "\\", "\x00", "lambda: "]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(text=st.text() | st.lists(pieces, max_size=25).map("".join))
def test_no_text_raises_and_text_that_is_no_call_is_kept(text):
    for parsed in (tool_calls.parse(text), tool_calls.split(text)):
        assert parsed.calls or text.startswith(parsed.text)
        assert not (parsed.calls and parsed.reason)


def test_calls_behind_text_are_found_where_they_are_known_to_be():
    parsed = tool_calls.split("Let me look [1].[f(a=1), g()]<|eom|>")
    assert parsed == Parsed((ToolCall("f", {"a": 1}), ToolCall("g", {})), "Let me look [1].")
    assert tool_calls.parse("Let me look.[f(a=1)]").calls == ()


@pytest.mark.parametrize(
    ("calls", "style", "message"),
    [
        ([], "json", "no calls"),
        ([ToolCall("f", {})], "xml", "style='xml' is none of 'json', 'pythonic', 'function'"),
        ([ToolCall("my-tool", {})], "pythonic", "no Python name; use style='json'"),
        ([ToolCall("class", {})], "pythonic", "no Python name"),
        ([ToolCall("a>b", {})], "function", "use style='json'"),
        ([ToolCall("f", {"a": float("nan")})], "pythonic", "not a JSON object"),
        ([ToolCall("f", {"a": {1: 2}})], "json", "they change when written as JSON"),
        ([ToolCall("f", {"a": {1, 2}})], "function", "not a JSON object"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_way_out(calls, style, message):
    with pytest.raises(ValueError, match=message):
        tool_calls.render(calls, style)


def test_the_openai_form_goes_both_ways():
    call = ToolCall("f", {"a": ["é", 1]})
    assert tool_calls.from_openai(tool_calls.to_openai(call)) == call
    assert tool_calls.from_openai({"id": "7", "function": {"name": "f", "arguments": {"a": ["é", 1]}}}) == call
    with pytest.raises(ValueError, match="nested too deeply"):
        tool_calls.from_openai({"name": "f", "arguments": '{"a": ' + "[" * 100_000})
