"""What a row says reaches the text, or an error says what does not: conventions, losses of rendering, weights, headers."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import make_tokenizer
from trl.data.chat import ChatTemplate
from trl.data.messages import check_contents, is_trained, tidy_messages
from trl.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}")
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}",
)
JOINED = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ 'with ' + c.function.arguments }}")
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def template(source: str, *special: str) -> ChatTemplate:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def said(*turns: tuple[str, str], **more) -> list[dict]:
    return [{"role": role, "content": content, **more} for role, content in turns]


# ---- conventions ----


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("system", "system"),
    ],
)
def test_the_speakers_of_sharegpt_are_roles(speaker, role):
    assert tidy_messages([{"from": speaker, "value": "Yes."}]) == [{"role": role, "content": "Yes."}]


def test_a_call_of_sharegpt_is_a_tool_call():
    (message,) = tidy_messages(
        [{"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'}]
    )
    assert message["role"] == "assistant"
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    with pytest.raises(DataError, match="message 1: a function_call has to be JSON text, but 'weather' is not"):
        tidy_messages([{"from": "function_call", "value": "weather"}])


def test_arguments_as_json_text_are_decoded_once():
    (message,) = tidy_messages([{"role": "assistant", "content": "", "tool_calls": [CALL]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    with pytest.raises(
        DataError, match="message 1: tool_calls: arguments has to be JSON text, but 'city=Paris' is not"
    ):
        tidy_messages([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "city=Paris"}}]}])


@pytest.mark.parametrize("source", [CALLS, JOINED])
def test_templates_get_arguments_as_they_read_them(source):
    messages = tidy_messages([*said(("user", "Weather?")), {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    assert '{"city": "Paris"}' in template(source).whole(messages)


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_parts_of_other_conventions_are_text(key):
    parts = [{"type": "text", key: "Is it "}, {"type": "text", key: "far?"}]
    assert tidy_messages([{"role": "user", "content": parts}]) == said(("user", "Is it far?"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(1, "content has to be text, found 1"), ([{"type": "text"}], "part 1 of type text has no text")],
)
def test_content_that_is_no_text_is_named(content, words):
    with pytest.raises(DataError, match=f"message 2: {words}"):
        tidy_messages([*said(("user", "Hi")), {"role": "assistant", "content": content}])


def test_a_template_of_parts_gets_parts():
    assert "Is it far?" in template(PARTS).whole(said(("user", "Is it far?"), ("assistant", "Two hours.")))


# ---- nothing is lost ----


@pytest.mark.parametrize("answer", ["It is sunny, and it will stay so.", "Yes."])
def test_a_message_that_the_template_drops_is_an_error(answer):
    messages = said(("user", "Weather?"), ("tool", answer), ("assistant", answer))
    with pytest.raises(DataError, match=r"message 2 \(tool\): the chat template of .* does not show its content"):
        template(STRICT).whole(messages)
    assert template(CHATML).whole(messages).count(answer) == 2


def test_tool_calls_that_the_template_drops_are_an_error():
    messages = tidy_messages([*said(("user", "Weather?")), {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    for render in (ChatTemplate.whole, ChatTemplate.assistant_spans):
        with pytest.raises(DataError, match=r"message 2 \(assistant\): .* does not show its tool_calls"):
            render(template(CHATML), messages)


def test_a_prompt_and_its_answers_are_checked_too():
    made = template(STRICT)
    with pytest.raises(DataError, match=r"message 1 \(system\).* content, 'Be brief, and be polite\.'"):
        made.prompt(said(("system", "Be brief, and be polite."), ("user", "Is it far?")))
    with pytest.raises(DataError, match=r"message 2 \(tool\)"):
        made.answers(
            said(("user", "Is it far?")), [said(("tool", "It is two hours by train.")), said(("assistant", "No."))]
        )


# ---- contents under another key ----

STRICTER = CHATML.replace("m.content", "m['content'] + ''")
"""Raises an error of jinja's where a message has no content."""


@pytest.mark.parametrize("source", [CHATML, STRICTER])
@pytest.mark.parametrize("key", ["text", "value", "msg", "contnet"])
def test_a_message_without_content_is_named_with_the_key_that_was_meant(source, key):
    messages = [*said(("user", "Is it far?")), {"role": "assistant", key: "Two hours."}]
    words = rf"message 2 \(assistant\) has no 'content'; its keys are \['role', '{key}'\]. .* under '{key}': rename"
    for render in (ChatTemplate.whole, ChatTemplate.assistant_spans):
        with pytest.raises(DataError, match=words):
            render(template(source), messages)
    with pytest.raises(DataError, match=words):
        template(source).answers(messages[:1], [messages[1:]])
    with pytest.raises(DataError, match=rf"message 1 \(user\) has no 'content'.* under '{key}'"):
        template(source).prompt([{"role": "user", key: "Is it far?"}])


def test_a_message_that_says_something_else_needs_no_content():
    check_contents([{"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "thinking": "Far."}])
    check_contents([{"role": "tool", "tool_responses": ["sunny"]}], "{{ m.tool_responses }}")
    with pytest.raises(DataError, match=r"message 1 \(tool\) has no 'content'.*'tool_responses'"):
        check_contents([{"role": "tool", "tool_responses": ["sunny"]}], "{{ m.content }}")
    with pytest.raises(DataError, match=r"message 2 \(user\) has no 'content'.* Give it one"):
        check_contents([*said(("system", "")), {"role": "user", "name": "Ann"}])


# ---- what is learned ----


@pytest.mark.parametrize(("key", "off"), [("weight", 0), ("loss_weight", 0.0), ("train", False)])
def test_messages_are_left_out_as_they_say(key, off):
    messages = said(("user", "Hi"), ("assistant", "Bad"), ("user", "Again"), ("assistant", "Good"))
    messages[1][key] = off
    text, spans = template(CHATML).assistant_spans(messages)
    assert [text[start:end] for start, end in spans] == ["Good<|im_end|>"]
    with pytest.raises(DataError, match="message 2 is excluded from training.*assistant_only_loss=True"):
        template(CHATML).whole(messages)


def test_a_weight_between_is_refused():
    assert is_trained({"weight": 1.0})
    with pytest.raises(DataError, match=r"weight=0\.5 of a message"):
        is_trained({"weight": 0.5})


TURNS = (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["A1<|im_end|>", "A2<|im_end|>"]),
        (
            "<|turn|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|><|turn|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            ["A1<|im_end|>", "A2<|im_end|>"],
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% else %}<|im_end|>{% endif %}",
            ["A1", "A2<|im_end|>"],
        ),
    ],
)
def test_the_header_of_the_next_turn_is_not_learned(source, expected):
    text, spans = template(source, "<|turn|>", "<|user|>", "<|assistant|>").assistant_spans(said(*TURNS))
    assert [text[start:end] for start, end in spans] == expected


def test_a_template_that_ends_no_turn_is_said(caplog):
    made = template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    with caplog.at_level(logging.WARNING, "trl"):
        made.whole(said(*TURNS))
        made.whole(said(*TURNS))
    assert caplog.text.count("the model will not learn to stop") == 1


def test_a_conversation_without_an_answer_is_said_once(caplog):
    made = template(CHATML)
    with caplog.at_level(logging.WARNING, "trl"):
        made.whole(said(("user", "Is it far?"), ("assistant", "No.")))
        assert not caplog.text
        made.whole(said(("system", "Be brief."), ("user", "Is it far?")))
        made.whole(said(("user", "Is it open?")))
    assert caplog.text.count("no message of the assistant, only of 'user' (the last one begins with 'Is it far?')") == 1


def test_a_misspelt_role_is_said_with_the_one_that_was_meant(caplog):
    with caplog.at_level(logging.WARNING, "trl"):
        template(CHATML).whole(said(("user", "Q"), ("assisant", "A")))
    assert "'assisant'" in caplog.text
    assert "Did you mean 'assistant'?" in caplog.text
