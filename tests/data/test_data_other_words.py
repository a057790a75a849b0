"""Rows as people write them in other words: roles, keys, calls, tools and conversations as text reach what is learned."""

from __future__ import annotations

import json
import logging
from functools import cache

import pytest
from datasets import Dataset

from tests.data.chat_families import FAMILIES
from trl.data.chat import ChatTemplate
from trl.data.conventions import in_known_columns
from trl.data.encode import EncodeSettings, decode, encode_dataset
from trl.data.messages import role_of, tidy_messages
from trl.data.shown import meant_key
from trl.errors import DataError

ASK = {"role": "user", "content": "Weather?"}
SAID = {"role": "assistant", "content": "It is sunny."}
RESULT = {"role": "tool", "content": "sunny"}
CALLED = {"name": "weather", "arguments": {"city": "Paris"}}
CALL = {"type": "function", "function": CALLED}
TWICE = [CALL, {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SHOWS_TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"


@cache
def tokenizer(family: str):
    return FAMILIES[family].tokenizer()


def template(family: str = "qwen2", source: str | None = None) -> ChatTemplate:
    return ChatTemplate(tokenizer(family), chat_template=source)


def shown(rows: list[dict], family: str = "qwen2", **settings) -> list[tuple[str, str]]:
    """The text of each row, and what of it is learned."""
    made = tokenizer(family)
    rows = in_known_columns(Dataset.from_list(rows), has_template=True, text_field="text")
    encoded = encode_dataset(rows, made, settings=EncodeSettings(**settings)).dataset
    texts = []
    for (example,) in map(decode, encoded):
        (completion,) = example.completions
        mask = [True] * len(completion) if completion.mask is None else completion.mask
        learned = [token for token, kept in zip(completion.ids, mask, strict=True) if kept]
        texts.append((made.decode([*example.prompt, *completion.ids]), made.decode(learned)))
    return texts


# ---- conversations as text ----


@pytest.mark.parametrize("written", [json.dumps, str, lambda value: json.dumps(value, indent=2)])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAID]},
        {"conversations": [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "It is sunny."}]},
        {"prompt": [ASK], "completion": [SAID]},
        {"system": "", "messages": [ASK, SAID]},
    ],
)
def test_conversations_that_are_text_are_those_of_lists(row, written):
    as_text = {name: written(value) if isinstance(value, list) else value for name, value in row.items()}
    assert shown([as_text]) == shown([row])
    assert "role" not in shown([as_text])[0][0]


def test_text_that_is_no_conversation_stays_and_one_that_breaks_is_named():
    text = 'Say [{"role": "user"}].'
    assert shown([{"prompt": text, "completion": "Yes"}])[0][1].startswith("Yes")
    with pytest.raises(DataError, match=r"Row 2, column 'messages': .* begins like a conversation, but is neither"):
        shown([{"messages": json.dumps([ASK, SAID])}, {"messages": '[{"role": "user", "content": }]'}])


# ---- roles ----


@pytest.mark.parametrize("asked", ["User", "human", "USER", " user"])
@pytest.mark.parametrize("answers", ["Assistant", "gpt", "model", "AI", "bot"])
def test_roles_in_other_words_are_those_of_templates(asked, answers):
    row = {"messages": [{**ASK, "role": asked}, {**SAID, "role": answers}]}
    assert shown([row], assistant_only_loss=True) == shown([{"messages": [ASK, SAID]}], assistant_only_loss=True)


def test_a_role_that_a_template_asks_for_stays():
    assert role_of("observation") == "tool"
    assert role_of("observation", "{% if m.role == 'observation' %}") == "observation"
    assert role_of("model", "{% if m['role'] == 'assistant' %}{% set role = 'model' %}") == "assistant"
    assert role_of("critic") == "critic"


def test_a_role_of_nobody_is_said_once(caplog):
    made, chat = template(), [{**ASK, "role": "customer"}, {**SAID, "role": "agent"}]
    with caplog.at_level(logging.WARNING, "trl"):
        made.whole(chat)
        made.whole(chat)
    assert caplog.text.count("the role 'customer'") == caplog.text.count("the role 'agent'") == 1


# ---- keys ----


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("contnet", "content"),
        ("Content", "content"),
        ("wieght", "weight"),
        ("reasoning_contents", "reasoning_content"),
        ("tool-calls", "tool_calls"),
        ("timestamp", None),
        ("model", None),
        ("lang", None),
    ],
)
def test_slips_of_keys(key, meant, caplog):
    assert meant_key(key) == meant
    chat = [ASK, {**SAID, key: "Two."}]
    if meant is None:
        with caplog.at_level(logging.WARNING, "trl"):
            template().whole(chat)
        assert f"does not read: {key!r}" in caplog.text
    else:
        with pytest.raises(DataError, match=rf"message 2 \(assistant\): the key {key!r} is not used.*{meant!r}"):
            template().whole(chat)


@pytest.mark.parametrize("key", ["training", "mask", "train_detail", "loss"])
def test_keys_that_say_otherwise_what_is_learned_are_refused(key):
    with pytest.raises(DataError, match=rf"message 2 \(assistant\): the key {key!r} is not supported\. Use 'weight'"):
        template().assistant_spans([ASK, {**SAID, key: False}])


def test_a_text_beside_an_empty_content_is_named():
    with pytest.raises(DataError, match="no text in 'content'.*under 'text'"):
        template().whole([ASK, {"role": "assistant", "content": "", "text": "It is sunny."}])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": [ASK], "completion": [{**SAID, "weight": 0}]}, "completion"),
        ({"prompt": [ASK], "chosen": [{**SAID, "train": False}], "rejected": [ASK, SAID]}, "chosen"),
        ({"prompt": [ASK], "completion": [{**SAID, "loss_weight": 0.0}], "label": True}, "completion"),
    ],
)
def test_answers_that_are_not_to_be_learned_are_refused_where_they_would_be(row, kind):
    with pytest.raises(DataError, match=f"Row 1, column '{kind}': message 1 is excluded from training"):
        shown([row])


def test_of_a_completion_the_turns_with_weight_are_learned():
    turns = [{**SAID, "content": "BAD", "weight": 0}, ASK, {**SAID, "weight": 1}]
    assert shown([{"prompt": [ASK], "completion": turns}], assistant_only_loss=True)[0][1] == "It is sunny.<|im_end|>"


# ---- tools ----


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gpt_oss"])
@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [CALLED]},
        {"tool_calls": [{"name": "weather", "parameters": {"city": "Paris"}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "weather", "args": '{"city": "Paris"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [json.dumps(CALL)]},
        {"tool_calls": [{**CALL, "function": {**CALLED, "arguments": json.dumps(json.dumps({"city": "Paris"}))}}]},
        {"tool_call": CALL},
        {"function_call": json.dumps(CALLED)},
        {"function_call": {**CALLED, "arguments": '{"city": "Paris"}'}},
    ],
)
def test_calls_of_any_convention_are_those_of_the_usual_one(family, said):
    def chat(said):
        return tidy_messages([ASK, {"role": "assistant", "content": "", **said}, RESULT, SAID])

    assert template(family).assistant_spans(chat(said)) == template(family).assistant_spans(
        chat({"tool_calls": [CALL]})
    )


def test_a_call_without_a_name_is_named():
    with pytest.raises(DataError, match='message 1: tool_calls: a call has to be JSON with "name" and "arguments"'):
        tidy_messages([{"role": "assistant", "tool_calls": [{"arguments": {}}]}])


@pytest.mark.parametrize("calls", [TWICE, [CALL, {"function": {"name": "rain", "arguments": {"city": "Rome"}}}]])
def test_a_template_that_shows_one_call_of_two_is_an_error(calls):
    chat = tidy_messages([ASK, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT, RESULT, SAID])
    text, _ = template("qwen2").assistant_spans(chat)
    assert text.count("</tool_call>") == 2
    with pytest.raises(DataError, match=r"message 2 \(assistant\): .* does not show its tool_calls, .*'Rome'"):
        template("gpt_oss").assistant_spans(chat)


def test_a_template_that_drops_arguments_is_an_error():
    source = FAMILIES["qwen2"].template.replace("{{ c.function.arguments | tojson }}", "")
    with pytest.raises(DataError, match="does not show its tool_calls, .*'Paris'"):
        template(source=source).whole([ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}])


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_reach_the_text_or_are_missed(tools):
    row = {"tools": tools}
    assert template(source=SHOWS_TOOLS + FAMILIES["qwen2"].template).whole([ASK, SAID], row).startswith("<weather>")
    with pytest.raises(DataError, match="column 'tools': the chat template of .* does not show tools, here weather"):
        template().whole([ASK, SAID], row)


def test_template_options_may_be_text_and_those_that_nothing_reads_are_said(caplog):
    made = template(source="{% if brief %}!{% endif %}" + FAMILIES["qwen2"].template)
    with caplog.at_level(logging.WARNING, "trl"):
        assert made.whole([ASK, SAID], {"chat_template_kwargs": '{"brief": true}'}).startswith("!")
        assert not caplog.text
        made.whole([ASK, SAID], {"chat_template_kwargs": {"enable_thinkng": False}})
    assert "does not use 'enable_thinkng'" in caplog.text


# ---- columns ----


@pytest.mark.parametrize(
    ("row", "begins"),
    [
        ({"system": "Be brief.", "prompt": "Far?", "completion": "No."}, "Be brief."),
        ({"system_prompt": "Be brief.", "prompt": [ASK], "completion": [SAID]}, "<|im_start|>system\nBe brief."),
        ({"system_message": "Be brief.", "messages": [ASK, SAID]}, "<|im_start|>system\nBe brief."),
        ({"system_prompt": "Be brief.", "question": "Far?", "response": "No."}, "<|im_start|>system\nBe brief."),
        ({"system": "Be brief.", "messages": json.dumps([ASK, SAID])}, "<|im_start|>system\nBe brief."),
        ({"system": "Be brief.", "text": "Other.", "messages": [ASK, SAID]}, "<|im_start|>system\nBe brief."),
    ],
)
def test_system_prompts_beside_rows_of_any_form(row, begins):
    assert shown([row])[0][0].startswith(begins)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Far?", "chosen": "No.", "rejected": "Yes."}, "Be brief.\n\nFar?"),
        ({"chosen": "Far? No.", "rejected": "Far? Yes."}, None),
        ({"prompt": [ASK], "chosen": [SAID], "rejected": [ASK, SAID]}, [ASK]),
        ({"chosen": [ASK, SAID], "rejected": [ASK, {**SAID, "content": "No."}]}, [ASK]),
        ({"prompt": "Weather?", "chosen": [SAID], "rejected": [{**SAID, "content": "No."}]}, [ASK]),
    ],
)
def test_system_prompts_beside_pairs(row, expected):
    (made,) = in_known_columns(Dataset.from_list([{**row, "system": "Be brief."}]), has_template=True)
    if expected is None:
        assert made == {name: f"Be brief.\n\n{row[name]}" for name in ("chosen", "rejected")}
    else:
        system = [{"role": "system", "content": "Be brief."}]
        assert made["prompt"] == (expected if isinstance(expected, str) else [*system, *expected])


def test_a_system_prompt_is_before_what_is_sampled_from():
    rows = Dataset.from_list([{"prompt": [ASK], "system": "Be brief.", "answer": "4"}])
    (made,) = in_known_columns(rows, has_template=True, prompts_only=True)
    assert made["prompt"] == [{"role": "system", "content": "Be brief."}, ASK]
    assert made["answer"] == "4"


def test_the_context_of_a_question_is_asked_with_it():
    (text, learned), *_ = shown([{"instruction": "Sum up.", "context": "A long text.", "response": "Short."}])
    assert "Sum up.\nA long text." in text
    assert "A long text." not in learned


@pytest.mark.parametrize("row", [{"messages": [ASK, SAID]}, {"prompt": "a", "completion": "b"}, {"text": "other"}])
def test_the_column_that_was_asked_for_is_the_text(row):
    rows = Dataset.from_list([{**row, "body": "Hello there"}])
    (encoded,) = encode_dataset(rows, tokenizer("qwen2"), settings=EncodeSettings(text_field="body")).dataset
    assert tokenizer("qwen2").decode(encoded["completion_ids"][0]) == "Hello there<|im_end|>"


def test_columns_that_nothing_reads_are_said(caplog):
    rows = Dataset.from_list([{"messages": [ASK, SAID], "tool": "x", "source": "web"}])
    with caplog.at_level(logging.INFO, "trl"):
        encoded = encode_dataset(rows, tokenizer("qwen2"), settings=EncodeSettings(text_field="body"))
    assert encoded.report.unread == ("tool", "source")
    assert "Not read: tool, source." in caplog.text
    assert "The column 'tool' of 'train' is not used. Did you mean 'tools'?" in caplog.text
    assert "dataset_text_field='body' is not a column of 'train': the columns ['messages'] are used" in caplog.text


def test_a_text_beside_rows_of_another_kind_is_said(caplog):
    texts = {"text": ["Q: hi A: yo"] * 2}
    pairs = {"prompt": ["hi"] * 2, "completion": [" yo"] * 2}
    settings = EncodeSettings(kind=("dialogue", "language_modeling", "prompt_completion", "tokenized"))
    encode_dataset(Dataset.from_dict({**pairs, **texts}), tokenizer("qwen2"), settings=settings)
    assert "The column 'text' of 'train' is not trained on, since the rows also have prompt, completion." in caplog.text
    caplog.clear()
    for rows in (texts, {"input_ids": [[5, 6]] * 2, **texts}):
        encode_dataset(Dataset.from_dict(rows), tokenizer("qwen2"), settings=settings)
    assert "not trained on" not in caplog.text


# ---- what stands twice, or otherwise ----


@pytest.mark.parametrize("column", ["completion", "chosen"])
def test_a_prompt_that_answers_repeat_is_there_once(column):
    other = {} if column == "completion" else {"rejected": [ASK, {**SAID, "content": "No."}]}
    rows = Dataset.from_list([{"prompt": [ASK], column: [ASK, SAID], **other}])
    (encoded,) = encode_dataset(rows, tokenizer("qwen2")).dataset
    assert tokenizer("qwen2").decode(encoded["completion_ids"][0]) == "It is sunny.<|im_end|>\n"


def test_texts_that_repeat_their_prompt_are_said(caplog):
    rows = [{"prompt": "Far?", "chosen": "Far? No.", "rejected": "Far? Yes."}] * 2
    with caplog.at_level(logging.WARNING, "trl"):
        encode_dataset(Dataset.from_list([{**rows[0], "chosen": "No."}, *rows]), tokenizer("qwen2"))
        assert not caplog.text
        encode_dataset(Dataset.from_list(rows), tokenizer("qwen2"))
    assert "In row 1 and the following rows, the answers repeat the prompt" in caplog.text


def test_a_conversation_may_be_a_dict_of_lists():
    chat = {"role": ["user", "assistant"], "content": ["Weather?", "It is sunny."]}
    assert shown([{"messages": chat}]) == shown([{"messages": [ASK, SAID]}])


def test_an_empty_first_row_does_not_say_what_a_column_holds():
    rows = Dataset.from_list([{"messages": None}, {"messages": [ASK, SAID]}])
    with pytest.raises(DataError, match="Row 1, column 'messages': expected a list of messages, found None"):
        encode_dataset(rows, tokenizer("qwen2"))
