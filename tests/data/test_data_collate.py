"""The classic collator for answers, and streams that begin again."""

from itertools import islice

import pytest
from datasets import Dataset

from trl.data.completion_collator import DataCollatorForCompletionOnlyLM, occurrences
from trl.data.examples import Endless
from trl.errors import ConfigError, DataError

RESPONSE, INSTRUCTION = [7, 8], [5]


@pytest.fixture
def tokenizer(make):
    return make.tokenizer()


def test_occurrences():
    assert occurrences([1, 1, 1, 2], [1, 1]) == [0, 1]
    assert occurrences([1], [1, 1]) == []


def test_tokens_after_the_last_response_template_are_labelled(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)
    batch = collator([{"input_ids": [7, 8, 3, 7, 8, 4, 2]}, {"input_ids": [7, 8, 6]}])
    assert batch["input_ids"].tolist() == [[7, 8, 3, 7, 8, 4, 2], [7, 8, 6, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert batch["labels"].tolist() == [[-100] * 5 + [4, 2], [-100, -100, 6] + [-100] * 4]


def test_every_answer_is_labelled_up_to_the_next_instruction(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, INSTRUCTION, tokenizer=tokenizer, ignore_index=-1)
    batch = collator([{"input_ids": [5, 1, 7, 8, 3, 5, 1, 7, 8, 4]}])
    assert batch["labels"].tolist() == [[-1, -1, -1, -1, 3, -1, -1, -1, -1, 4]]


def test_eos_is_labelled_when_it_is_the_pad_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)
    batch = collator([[7, 8, 3, 2], [7, 8, 3, 4, 2]])
    assert batch["labels"].tolist() == [[-100, -100, 3, 2, -100], [-100, -100, 3, 4, 2]]


def test_padding_side_is_the_tokenizer_s(tokenizer):
    tokenizer.padding_side = "left"
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)([[7, 8, 3], [7, 8, 3, 4]])
    assert batch["input_ids"].tolist() == [[0, 7, 8, 3], [7, 8, 3, 4]]


def test_padding_free_rows_are_laid_end_to_end(tokenizer):
    batch = DataCollatorForCompletionOnlyLM([7], tokenizer=tokenizer, padding_free=True)([[7, 3], [7, 4, 2]])
    assert batch["input_ids"].tolist() == [[7, 3, 7, 4, 2]]
    assert batch["labels"].tolist() == [[-100, 3, -100, 4, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert "attention_mask" not in batch


def test_templates_given_as_text(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(" Answer", tokenizer=tokenizer)
    ids = tokenizer.encode("Question yes Answer no")
    mask = collator.completion_mask(ids, 0)
    assert tokenizer.decode([t for t, trained in zip(ids, mask, strict=True) if trained]) == " no"


def test_a_template_that_is_nowhere_names_the_row(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, INSTRUCTION, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"Row 1 of a batch: the response template .* \(ids \[7, 8\]\) does not occur"):
        collator([[5, 3], [5, 1]])
    with pytest.raises(DataError, match=r"the instruction template .* give the token ids .* instruction_template"):
        collator([[7, 8, 3]])


def test_a_row_that_was_cut_before_its_answer_is_not_trained_on(tokenizer, caplog):
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)
    assert collator([[7, 8, 3], [5, 1]])["labels"].tolist() == [[-100, -100, 3], [-100] * 3]
    assert collator([[5, 1]])["labels"].tolist() == [[-100, -100]]
    (said,) = caplog.messages
    assert said.startswith("Row 2 of a batch: the response template")


def test_mlm_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="mlm=True is masked language modelling"):
        DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer, mlm=True)


def test_a_shuffled_stream_begins_again_in_another_order():
    stream = Dataset.from_dict({"number": range(8)}).to_iterable_dataset().shuffle(seed=0, buffer_size=8)
    numbers = [row["number"] for row in islice(Endless(stream), 16)]
    assert sorted(numbers[:8]) == sorted(numbers[8:]) == [*range(8)]
    assert numbers[:8] != numbers[8:]
    with pytest.raises(DataError, match="The stream of training rows is empty"):
        next(iter(Endless(stream.filter(lambda row: False))))
