"""Rows in the columns of other tools become those that are read here, or an error names row and column."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from tests.conftest import make_tokenizer
from trl.data.conventions import in_known_columns
from trl.data.encode import EncodeSettings, decode, encode_dataset
from trl.data.formats import detect_kind
from trl.data.messages import tidy_messages
from trl.errors import DataError


def said(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def answer(text):
    return [{"role": "assistant", "content": text}]


def known(row, *, has_template=True, **options):
    (made,) = in_known_columns(Dataset.from_list([row]), has_template=has_template, **options)
    return made


ALPACA = {
    "instruction": "Name it.",
    "input": "The sky",
    "output": "Blue.",
    "history": [["Hi", "Hello"]],
    "system": "Be brief.",
}
WRITTEN = "### Instruction:\n{}\n\n### Response:\n"
BEFORE = [{"from": "human", "value": "Is it far?"}]
PAIR = {"chosen": {"from": "gpt", "value": "Two hours."}, "rejected": {"from": "gpt", "value": "No."}}
HH = "\n\nHuman: Is it far?\n\nAssistant: {}\n\nHuman: Sure?\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            ALPACA,
            {
                "prompt": said("Hi", "Hello", "Name it.\nThe sky", system="Be brief."),
                "completion": answer("Blue."),
            },
        ),
        (
            {"instruction": "Name it.", "input": "", "output": "Blue."},
            {"prompt": said("Name it."), "completion": answer("Blue.")},
        ),
        ({"question": "Far?", "answer": "No."}, {"prompt": said("Far?"), "completion": answer("No.")}),
        ({"query": "Far?", "response": "No."}, {"prompt": said("Far?"), "completion": answer("No.")}),
        ({"prompt": "Far?", "response": "No."}, {"prompt": "Far?", "completion": "No."}),
        (
            {"system": "Be brief.", "question": "Far?", "chosen": "No.", "rejected": "Yes."},
            {"prompt": said("Far?", system="Be brief."), "chosen": answer("No."), "rejected": answer("Yes.")},
        ),
        (
            {"instruction": "Name it.", "input": "The sky", "chosen": "Blue.", "rejected": "Red."},
            {"prompt": said("Name it.\nThe sky"), "chosen": answer("Blue."), "rejected": answer("Red.")},
        ),
        (
            {"conversations": BEFORE, **PAIR},
            {"prompt": said("Is it far?"), "chosen": answer("Two hours."), "rejected": answer("No.")},
        ),
        (
            {"messages": said("Is it far?"), "chosen": answer("Two hours.")[0], "rejected": answer("No.")[0]},
            {"prompt": said("Is it far?"), "chosen": answer("Two hours."), "rejected": answer("No.")},
        ),
        (
            {"chosen": HH.format("Two hours.", "Yes."), "rejected": HH.format("Two hours.", "No.")},
            {"prompt": said("Is it far?", "Two hours.", "Sure?"), "chosen": answer("Yes."), "rejected": answer("No.")},
        ),
        (
            {
                "input": {"messages": said("Is it far?")},
                "preferred_output": answer("Two hours."),
                "non_preferred_output": answer("No."),
            },
            {"prompt": said("Is it far?"), "chosen": answer("Two hours."), "rejected": answer("No.")},
        ),
        (
            {"conversations": [*BEFORE, PAIR["chosen"]], "kto_tag": True},
            {"prompt": said("Is it far?"), "completion": answer("Two hours."), "label": True},
        ),
        (
            {"instruction": "Name it.", "output": "Blue.", "kto_tag": "false"},
            {"prompt": said("Name it."), "completion": answer("Blue."), "label": False},
        ),
        ({"conversations": BEFORE, "system": "Be brief."}, {"messages": said("Is it far?", system="Be brief.")}),
    ],
)
def test_columns_of_other_tools_are_those_that_are_read_here(row, expected):
    made = known({**row, "kept": 1})
    assert made.pop("kept") == 1
    assert made == expected
    detect_kind(made)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ALPACA, ("Be brief.\n\n" + WRITTEN.format("Hi") + "Hello\n\n" + WRITTEN.format("Name it.\nThe sky"), "Blue.")),
        ({"question": "Far?", "answer": "No."}, ("Far?\n", "No.")),
        ({"query": "Far? ", "output": "No."}, ("Far? ", "No.")),
    ],
)
def test_without_a_chat_template_they_are_texts(row, expected):
    made = known(row, has_template=False)
    assert (made["prompt"], made["completion"]) == expected


def test_a_prompt_is_asked_and_other_columns_are_left_to_rewards():
    assert known({"question": "2 + 2?", "answer": "4"}, prompts_only=True) == {"prompt": said("2 + 2?"), "answer": "4"}
    row = {"prompt": "2 + 2?", "answer": "4"}
    assert known(row, prompts_only=True) == row


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": said("Far?", system="Be brief."), "answer": "4"}, {"prompts_only": True}),
        ({"prompt": "Far?", "chosen": " No.", "rejected": " Yes."}, {}),
        ({"prompt": said("Far?"), "completion": answer("No.")}, {}),
    ],
)
def test_a_prompt_that_was_made_from_a_question_is_kept(row, options):
    row = {"question": "Is it far?", **row}
    assert known(row, **options) == row


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "instruction": "b", "output": "c"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "a b", "rejected": "a c"},
        {"messages": said("a", "b")},
        {"input_ids": [1, 2], "input": "a", "output": "b"},
    ],
)
def test_columns_that_are_read_here_are_left_alone(row):
    assert known(row, text_field="text") == row


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "answer": 4}, "Row 2, column 'answer': expected a string, found int 4"),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "Row 2, column 'history': expected a list of .question, answer. pairs",
        ),
        ({"instruction": "a", "output": "b", "kto_tag": "good"}, "Row 2, column 'kto_tag': expected true"),
        ({"chosen": "Human: a", "rejected": HH}, "Row 2, column 'chosen': a dialogue begins with 'Human:'"),
    ],
)
def test_values_that_are_something_else_are_named(row, words):
    good = {"question": "a", "answer": "b", "instruction": "a", "output": "b", "history": [], "kto_tag": True}
    good |= {"chosen": HH, "rejected": HH}
    rows = [{name: good[name] for name in row}, row]
    with pytest.raises(DataError, match=words):
        list(in_known_columns(IterableDataset.from_generator(lambda: iter(rows)), has_template=True))


def test_calls_of_older_files_are_tool_calls():
    messages = tidy_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
            },
            {"role": "function", "name": "weather", "content": "sunny"},
        ]
    )
    assert messages[0]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert messages[1]["role"] == "tool"


def test_an_error_says_which_command_takes_the_columns():
    with pytest.raises(
        DataError, match=r"fit the kind unpaired_preference, which trl kto takes\. Rename columns \(--dataset_rename"
    ):
        detect_kind(["prompt", "completion", "label"], allowed=("preference",))
    with pytest.raises(DataError, match="fit the kind prompt_completion, which trl sft takes"):
        detect_kind(["prompt", "completion"], allowed=("preference",))


def test_they_are_learned_as_what_they_become():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = in_known_columns(Dataset.from_list([ALPACA]), has_template=True)
    encoded = encode_dataset(rows, tokenizer, settings=EncodeSettings(kind="prompt_completion")).dataset[0]
    (example,) = decode(encoded)
    assert tokenizer.decode(example.completions[0].ids) == "Blue.<|im_end|>\n"
    assert "The sky" in tokenizer.decode(example.prompt)
