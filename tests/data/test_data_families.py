"""What is learned of conversations, with the templates of sixteen families: past turns rewritten, tools, systems."""

from __future__ import annotations

import re

import pytest

from tests.data.chat_families import FAMILIES
from trl.data.chat import ChatTemplate
from trl.data.encode import EncodeSettings, encode_dataset
from trl.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
PLAIN = [
    {"role": "user", "content": "Is it far?"},
    {"role": "assistant", "content": "Two hours."},
    {"role": "user", "content": "By train?"},
    {"role": "assistant", "content": "By train."},
]
THOUGHT = [m | ({"reasoning_content": f"Hm {i}."} if i % 2 else {}) for i, m in enumerate(PLAIN)]
AGENT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "I must ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Good."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Very sure.", "reasoning_content": "Yes."},
]
SYSTEM = {"role": "system", "content": "Answer in three words."}

ENDS = {  # of turns that are past, and of the last
    "qwen2": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "llama2": (" </s>", " </s>"),
    "mistral": ("</s>", "</s>"),
    "gemma": ("<end_of_turn>", "<end_of_turn>"),
    "phi3": ("<|end|>", "<|end|>\n<|endoftext|>"),
    "deepseek_r1": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "glm": ("", ""),
    "gpt_oss": ("<|end|>", "<|return|>"),
    "command_r": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "granite": ("<|end_of_text|>", "<|end_of_text|>"),
    "zephyr": ("</s>", "</s>"),
    "tulu": ("</s>", "</s>"),
    "vicuna": ("</s>", "</s>"),
    "line_after_turns": ("</s>", "</s>"),
}
BEFORE = {  # what stands between the generation prompt and the answer
    "llama2": " ",
    "mistral": " ",
    "vicuna": " ",
    "glm": "\n<think></think>\n",
    "gpt_oss": "<|channel|>final<|message|>",
}


def learned(family: str, messages: list[dict]) -> list[str]:
    text, spans = ChatTemplate(FAMILIES[family].tokenizer()).assistant_spans(messages)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learned_with_the_token_that_ends_it(family, system):
    before, (past, last) = BEFORE.get(family, ""), ENDS[family]
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    expected = [f"{before}Two hours.{past}", f"{before}{thought}By train.{last}"]
    assert learned(family, [SYSTEM, *PLAIN] if system else PLAIN) == expected


ALONE = {"glm", "mistral", "llama2"}
"""Families whose templates write nothing that tells two answers from one, or more before each."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ALONE))
def test_answers_may_come_first_and_one_after_the_other(family):
    before = BEFORE.get(family, "")
    first, second, third = learned(family, [PLAIN[1], PLAIN[0], PLAIN[1], PLAIN[3]])
    for answer, said in ((first, "Two hours."), (second, "Two hours."), (third, "By train.")):
        assert answer.startswith((before + said, "<think>"))
        assert answer.count(said) == 1


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", ["Two hours.<|im_end|>", "<think>\nHm 3.\n</think>\n\nBy train.<|im_end|>"]),
        ("glm", ["\n<think></think>\nTwo hours.", "\n<think>Hm 3.</think>\nBy train."]),
        (
            "gpt_oss",
            [
                "<|channel|>final<|message|>Two hours.<|end|>",
                "<|channel|>analysis<|message|>Hm 3.<|end|><|start|>assistant<|channel|>final<|message|>By train.<|return|>",
            ],
        ),
    ],
)
def test_reasoning_of_past_turns_is_not_there_to_be_learned(family, expected):
    assert learned(family, THOUGHT) == expected


@pytest.mark.parametrize(
    ("family", "call", "answer", "last"),
    [
        (
            "qwen3",
            '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "It is sunny.<|im_end|>",
            "<think>\nYes.\n</think>\n\nVery sure.<|im_end|>",
        ),
        (
            "glm",
            '\n<think></think>\n<tool_call>weather\n{"city": "Paris"}\n</tool_call>',
            "\n<think></think>\nIt is sunny.",
            "\n<think>Yes.</think>\nVery sure.",
        ),
        (
            "gpt_oss",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
            "<|channel|>final<|message|>It is sunny.<|end|>",
            "<|channel|>analysis<|message|>Yes.<|end|><|start|>assistant<|channel|>final<|message|>Very sure.<|return|>",
        ),
    ],
)
def test_calls_of_past_turns_are_learned_without_their_reasoning(family, call, answer, last):
    assert learned(family, AGENT) == [call, answer, last]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.has_tools])
def test_a_call_is_learned_and_the_answer_of_the_tool_is_not(family):
    bare = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in AGENT]
    call, answer, last = learned(family, [SYSTEM, *bare])
    assert "weather" in call
    assert "Paris" in call
    assert "sunny" not in call
    assert "It is sunny." in answer
    assert "Sure?" not in answer + last


@pytest.mark.parametrize("family", ["glm", "gpt_oss", "mistral", "qwen3"])
def test_prompt_and_completion_learn_what_conversations_do_of_the_last_turn(family):
    tokenizer = FAMILIES[family].tokenizer()
    turns = PLAIN if family == "mistral" else THOUGHT
    prompt, (answer,) = ChatTemplate(tokenizer).answers([SYSTEM, *turns[:-1]], [turns[-1:]])
    assert answer.rstrip() == learned(family, [SYSTEM, *turns])[-1]
    asked = tokenizer.apply_chat_template([SYSTEM, *turns[:-1]], tokenize=False, add_generation_prompt=True)
    assert prompt == asked


def test_an_answer_after_a_call_continues_what_the_model_has_read():
    """GPT-OSS drops the reasoning of a call once there is an answer; while it is written, it is there."""
    tokenizer = FAMILIES["gpt_oss"].tokenizer()
    prompt, (answer,) = ChatTemplate(tokenizer).answers(AGENT[:3], [AGENT[3:4]])
    assert prompt == tokenizer.apply_chat_template(AGENT[:3], tokenize=False, add_generation_prompt=True)
    assert "I must ask." in prompt
    assert answer.startswith("<|channel|>analysis<|message|>Good.<|end|>")


@pytest.mark.parametrize("family", ["gpt_oss", "glm", "mistral"])
def test_masks_of_tokens_are_those_of_the_text(family):
    from datasets import Dataset

    tokenizer = FAMILIES[family].tokenizer()
    settings = EncodeSettings(assistant_only_loss=True)
    (row,) = encode_dataset(Dataset.from_list([{"messages": PLAIN}]), tokenizer, settings=settings).dataset
    ids, mask = row["completion_ids"][0], row["completion_mask"][0]
    shown = tokenizer.decode([t for t, kept in zip(ids, mask, strict=True) if kept])
    assert shown == "".join(learned(family, PLAIN))


@pytest.mark.parametrize(
    ("family", "turn", "words"),
    [
        ("llama3", THOUGHT[1], "reasoning_content, 'Hm 1.'. Use a template that does"),
        ("llama3", THOUGHT[1] | {"thinking": "Hm 1."}, "reasoning_content, 'Hm 1.'"),
        ("phi3", PLAIN[1] | {"thinking": "Hm."}, "thinking, 'Hm.'. Use a template"),
        ("deepseek_r1", PLAIN[1] | {"content": "<think>Hm, well.</think>Two hours."}, "reasoning, 'Hm, well.'"),
    ],
)
def test_reasoning_that_a_template_never_shows_is_an_error(family, turn, words):
    with pytest.raises(DataError, match=rf"message 2 \(assistant\): .* does not show its {re.escape(words)}"):
        learned(family, [PLAIN[0], turn])


def test_reasoning_under_two_names_is_shown_once():
    (span,) = learned("qwen3", [PLAIN[0], THOUGHT[1] | {"thinking": "Hm 1."}])
    assert span.count("Hm 1.") == 1


def test_a_template_that_strips_contents_gets_text():
    text = ChatTemplate(FAMILIES["llama3"].tokenizer()).whole(PLAIN)
    assert "<|end_header_id|>\n\nIs it far?<|eot_id|>" in text
