"""Every row kind as one prompt and its completions; what is cut, dropped and counted; and what is refused."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import ByT5Tokenizer

from trl.data.completion_collator import DataCollatorForCompletionOnlyLM
from trl.data.encode import EncodeSettings, EncodingReport, decode, encode_dataset, first_rows
from trl.data.row_encoder import tokenizer_key
from trl.errors import ConfigError, DataError

HEADER = "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n"
ASK = [{"role": "user", "content": "sky"}]
BLUE = [{"role": "assistant", "content": "blue"}]
GREEN = [{"role": "assistant", "content": "green"}]


@pytest.fixture
def plain(make):
    return make.tokenizer()


@pytest.fixture
def chatml(make):
    return make.tokenizer("chatml", eos="<|im_end|>")


def encoded(rows, tokenizer, **settings):
    return encode_dataset(Dataset.from_list(rows), tokenizer, settings=EncodeSettings(**settings))


def examples(rows, tokenizer, **settings):
    return [example for row in encoded(rows, tokenizer, **settings).dataset for example in decode(row)]


def only(rows, tokenizer, **settings):
    (example,) = examples(rows, tokenizer, **settings)
    return example


def texts(example, tokenizer):
    """The text of the prompt, and of each completion's trained tokens."""
    masks = [c.mask or [True] * len(c) for c in example.completions]
    trained = [
        tokenizer.decode([t for t, on in zip(c.ids, mask, strict=True) if on])
        for c, mask in zip(example.completions, masks, strict=True)
    ]
    return tokenizer.decode(example.prompt), trained


# Row kinds


def test_text_ends_with_one_eos(plain):
    for row in ("the sky", "the sky</s>"):
        example = only([{"text": row}], plain)
        assert (list(example.prompt), example.completions[0].mask) == ([], None)
        assert plain.decode(example.completions[0].ids) == "the sky</s>"
    assert plain.decode(only([{"text": "the sky"}], plain, add_eos=False).completions[0].ids) == "the sky"


def test_an_eos_that_stands_in_a_prompt_stays(make):
    tokenizer = make.tokenizer(bos=True)
    prompt = only([{"prompt": "what is</s>", "completion": " blue"}], tokenizer).prompt
    assert tokenizer.decode(prompt) == "<s>what is</s>"


def test_text_field_and_eos_token(make):
    tokenizer = make.tokenizer(eos=None)
    example = only([{"review": "the sky"}], tokenizer, text_field="review", eos_token="<|im_end|>")
    assert tokenizer.decode(example.completions[0].ids) == "the sky<|im_end|>"


def test_text_begins_with_bos_once_and_completions_without(make):
    tokenizer = make.tokenizer(bos=True)
    sky = only([{"text": "sky"}], tokenizer)
    assert sky.completions[0].ids[0] == tokenizer.bos_token_id
    assert only([{"text": "<s>sky</s>"}], tokenizer) == sky
    bare = only([{"text": "sky"}], tokenizer, add_special_tokens=False, add_eos=False)
    assert tokenizer.decode(bare.completions[0].ids) == "sky"
    example = only([{"prompt": "sky", "completion": " blue"}], tokenizer)
    assert texts(example, tokenizer) == ("<s>sky", [" blue</s>"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK},
        {"prompt": ASK, "completion": BLUE},
        {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
        {"messages": ASK + BLUE},
    ],
)
def test_a_conversation_has_the_special_tokens_of_its_template_alone(make, row):
    tokenizer = make.tokenizer("chatml", bos=True)
    (example,) = examples([row], tokenizer)
    ids = [*example.prompt, *(token for completion in example.completions for token in completion.ids)]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.bos_token_id not in ids


def test_a_text_ends_with_eos_and_not_with_what_the_tokenizer_puts_after_it(make):
    tokenizer = make.tokenizer()
    closes = processors.TemplateProcessing(single="<s> $A <pad>", special_tokens=[("<s>", 1), ("<pad>", 0)])
    tokenizer.backend_tokenizer.post_processor = closes
    assert texts(only([{"text": "sky"}], tokenizer), tokenizer) == ("", ["<s>sky</s>"])
    pair = only([{"chosen": "sky blue", "rejected": "sky green"}], tokenizer)
    assert texts(pair, tokenizer) == ("<s>sky", [" blue</s>", " green</s>"])
    assert texts(only([{"prompt": "sky"}], tokenizer), tokenizer)[0] == "<s>sky"
    encoder = only([{"prompt": "sky", "completion": "blue"}], tokenizer, encoder_decoder=True)
    assert texts(encoder, tokenizer) == ("<s>sky<pad>", ["blue</s>"])
    assert texts(only([{"prompt": "sky"}], tokenizer, encoder_decoder=True), tokenizer)[0] == "<s>sky<pad>"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations(chatml, column):
    example = only([{column: ASK + BLUE}], chatml)
    assert texts(example, chatml) == ("", [f"{HEADER}blue<|im_end|>\n"])


def test_from_value_conversations(chatml):
    turns = [{"from": "user", "value": "sky"}, {"from": "assistant", "value": "blue"}]
    assert texts(only([{"conversations": turns}], chatml, assistant_only_loss=True), chatml) == ("", ["blue<|im_end|>"])


@pytest.mark.parametrize("template", ["chatml", "marked", "inst"])
def test_assistant_only_loss(make, template):
    tokenizer = make.tokenizer(template)
    example = only([{"messages": ASK + BLUE + ASK + GREEN}], tokenizer, assistant_only_loss=True)
    ending = " </s>" if template == "inst" else "<|im_end|>"
    learned = texts(example, tokenizer)[1][0].replace(" blue", "blue").replace(" green", "green")
    assert learned == f"blue{ending}green{ending}"


def test_tools_and_template_arguments_of_rows(make):
    tokenizer = make.tokenizer("chatml")
    tokenizer.chat_template = "{{ mood }}{{ tools[0].name if tools else 'no tools' }}{{ messages[0].content }}"
    rows = [
        {"messages": ASK, "tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "calm "}},
        {"messages": ASK, "tools": None, "chat_template_kwargs": {"mood": None}},
    ]
    first, second = examples(rows, tokenizer, chat_template_kwargs={"mood": "glad "})
    assert texts(first, tokenizer)[1] == ["calm addsky"]
    assert texts(second, tokenizer)[1] == ["glad no toolssky"]


def test_prompt_completion(plain, chatml):
    example = only([{"prompt": "the sky is", "completion": " blue"}], plain)
    assert texts(example, plain) == ("the sky is", [" blue</s>"])
    example = only([{"prompt": ASK, "completion": BLUE}], chatml)
    assert texts(example, chatml) == (HEADER, ["blue<|im_end|>\n"])


def test_prompts_are_trained_on_without_completion_only_loss(plain):
    example = only([{"prompt": "the sky is", "completion": " blue"}], plain, completion_only_loss=False)
    assert texts(example, plain) == ("", ["the sky is blue</s>"])


@pytest.mark.parametrize(
    ("prompt", "completion"), [("sk", "y blue"), ("the ", "sky"), ("sky\n\n", "\nblue"), ("", "sky")]
)
def test_what_a_model_reads_and_writes_at_generation_time(plain, prompt, completion):
    example = only([{"prompt": prompt, "completion": completion}], plain)
    assert list(example.prompt) == plain.encode(prompt)
    assert plain.decode(example.completions[0].ids) == f"{completion}</s>"


def test_a_tokenizer_that_writes_leading_spaces_continues_the_prompt(make):
    tokenizer = make.sentencepiece_like()
    example = only([{"prompt": "the sky is", "completion": " blue"}], tokenizer)
    assert list(example.prompt) == tokenizer.encode("the sky is")
    assert [*example.prompt, *example.completions[0].ids[:-1]] == tokenizer.encode("the sky is blue")


def test_only_the_assistant_in_completions(chatml):
    completion = [*BLUE, {"role": "tool", "content": "four"}, *GREEN]
    row = {"prompt": ASK + GREEN + ASK, "completion": completion}
    example = only([row], chatml, assistant_only_loss=True)
    assert texts(example, chatml)[1] == ["blue<|im_end|>green<|im_end|>"]
    assert texts(example, chatml)[0].endswith("<|im_start|>assistant\n")
    whole = only([row], chatml, assistant_only_loss=True, completion_only_loss=False)
    assert texts(whole, chatml) == ("", ["green<|im_end|>blue<|im_end|>green<|im_end|>"])


def test_a_turn_that_the_generation_prompt_has_begun_is_trained_on_from_there(make):
    tokenizer = make.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}<think>"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    example = only([{"prompt": ASK, "completion": BLUE}], tokenizer, assistant_only_loss=True)
    assert texts(example, tokenizer)[1] == ["blue<|im_end|>"]
    assert texts(example, tokenizer)[0].endswith("assistant\n<think>")


@pytest.mark.parametrize("implicit", [False, True])
def test_preferences_share_the_prompt(chatml, implicit):
    row = (
        {"chosen": ASK + BLUE, "rejected": ASK + GREEN}
        if implicit
        else {"prompt": ASK, "chosen": BLUE, "rejected": GREEN}
    )
    example = only([row], chatml)
    assert texts(example, chatml) == (HEADER, ["blue<|im_end|>\n", "green<|im_end|>\n"])


def test_text_preferences(plain):
    example = only([{"prompt": "the sky is", "chosen": " blue", "rejected": " green"}], plain)
    assert texts(example, plain) == ("the sky is", [" blue</s>", " green</s>"])


def test_an_implicit_text_prompt_is_the_common_beginning_in_tokens(plain):
    example = only([{"chosen": "the sky is blue", "rejected": "the sky isn"}], plain)
    chosen, rejected = ([*plain.encode(text), plain.eos_token_id] for text in ("the sky is blue", "the sky isn"))
    assert [*example.prompt, *example.completions[0].ids] == chosen
    assert [*example.prompt, *example.completions[1].ids] == rejected
    assert example.completions[0].ids[0] != example.completions[1].ids[0]


def test_signals_are_carried_along(plain):
    row = {"prompt": "sky", "chosen": " blue", "rejected": " green", "margin": 1.5, "source": "web"}
    example = only([row], plain, keep_columns=("margin", "score"))
    assert [dict(c.signals) for c in example.completions] == [{"margin": 1.5}, {"margin": 1.5}]


def test_unpaired_preferences(chatml):
    rows = [{"prompt": ASK, "completion": BLUE, "label": True}, {"prompt": ASK, "completion": GREEN, "label": False}]
    good, bad = examples(rows, chatml, keep_columns=("label",))
    assert (good.completions[0].signals, bad.completions[0].signals) == ({"label": 1.0}, {"label": 0.0})
    assert texts(bad, chatml) == (HEADER, ["green<|im_end|>\n"])


def test_steps_are_marked_at_their_last_token(plain):
    row = {"prompt": "two and two", "completions": ["think", "four"], "labels": [True, False]}
    completion = only([row], plain).completions[0]
    first, second = plain.encode("think") + plain.encode("\n"), plain.encode("four") + plain.encode("\n")
    assert list(completion.ids) == first + second
    assert [t for t, on in enumerate(completion.mask) if on] == [len(first) - 1, len(first) + len(second) - 1]
    assert [completion.signals["step_label"][t] for t, on in enumerate(completion.mask) if on] == [1.0, 0.0]


def test_token_ids_are_left_as_they_are(plain):
    assert only([{"input_ids": [4, 5, 6]}], plain).completions[0].ids == [4, 5, 6]


def test_labels_and_masks_of_token_ids(plain):
    row = {"input_ids": [4, 5, 6, 7, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [-100, 5, 6, 7, -100]}
    row |= {"completion_mask": [0, 0, 1, 1, 0], "assistant_masks": [0, 0, 0, 1, 0]}
    mask = lambda **settings: only([row], plain, **settings).completions[0].mask  # noqa: E731
    assert mask() == mask(assistant_only_loss=True) == [False, False, False, True]
    del row["assistant_masks"]
    assert mask() == [False, False, True, True]
    assert mask(completion_only_loss=False) == [False, True, True, True]
    assert only([row], plain).completions[0].ids == [4, 5, 6, 7]


def test_rows_that_come_packed_stay_packed(plain):
    row = {"input_ids": [4, 5, 6, 7, 8], "seq_lengths": [3, 2]}
    result = encoded([row], plain, max_length=4)
    assert [(e.completions[0].ids, e.completions[0].mask) for e in decode(result.dataset[0])] == [
        ([4, 5, 6], [False, True, True]),
        ([7, 8], [False, True]),
    ]
    assert result.report.trained == 3


def test_a_packed_document_of_one_token_has_none_to_predict(plain):
    result = encoded([{"input_ids": [4, 5, 6], "seq_lengths": [1, 2]}], plain)
    assert [(e.completions[0].ids, e.completions[0].mask) for e in decode(result.dataset[0])] == [
        ([4], [False]),
        ([5, 6], [False, True]),
    ]


def test_classic_reward_columns(plain):
    row = {"input_ids_chosen": [4, 5, 6, 0], "attention_mask_chosen": [1, 1, 1, 0]}
    row |= {"input_ids_rejected": [0, 4, 5, 7], "attention_mask_rejected": [0, 1, 1, 1]}
    example = only([row], plain)
    assert (example.prompt, [c.ids for c in example.completions]) == ([4, 5], [[6], [7]])


def test_prompts_alone(plain, chatml):
    assert texts(only([{"prompt": "the sky"}], plain), plain) == ("the sky", [])
    assert texts(only([{"prompt": ASK}], chatml), chatml) == (HEADER, [])


def test_encoder_decoder(make):
    tokenizer = make.tokenizer(bos=True)
    row = {"prompt": "the sky is", "completion": "blue"}
    example = only([row], tokenizer, encoder_decoder=True, max_prompt_length=3, max_length=9)
    assert list(example.prompt) == tokenizer.encode("the sky is")[:3]
    assert texts(example, tokenizer)[1] == ["blue</s>"]
    assert encoded([row], tokenizer, encoder_decoder=True).report.trained == len(example.completions[0])
    ids = only([{"input_ids": [4, 5], "labels": [6, 7, -100]}], tokenizer, encoder_decoder=True)
    assert (ids.prompt, ids.completions[0].ids) == ([4, 5], [6, 7])


def test_a_collator_s_mask(plain):
    collator = DataCollatorForCompletionOnlyLM(" Answer", tokenizer=plain)
    example = only([{"text": "Question yes Answer no"}], plain, token_mask=collator.completion_mask)
    assert texts(example, plain) == ("", [" no</s>"])


# Truncation, dropping, counting


def test_preferences_as_ids_with_and_without_a_prompt(make):
    tokenizer = make.tokenizer()
    whole = only([{"chosen_ids": [4, 5, 6], "rejected_ids": [4, 5, 7]}], tokenizer, kind="tokenized_preference")
    parts = {"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [7]}
    assert only([parts], tokenizer, kind="tokenized_preference") == whole
    assert (list(whole.prompt), [list(c.ids) for c in whole.completions]) == ([4, 5], [[6], [7]])


PAIR = {"input_ids_chosen": [1, 2, 3, 4, 5, 6, 7, 8], "input_ids_rejected": [1, 2, 3, 4, 5, 9, 10]}
PAIR_TEXT = {"prompt": "sky", "chosen": " blue", "rejected": " green"}


@pytest.mark.parametrize(
    ("settings", "prompt", "completions"),
    [
        ({"max_length": 8}, [1, 2, 3, 4, 5], [[6, 7, 8], [9, 10]]),
        ({"max_length": 7}, [1, 2, 3, 4, 5], [[6, 7], [9, 10]]),
        ({"max_length": 6, "truncation_mode": "keep_end"}, [3, 4, 5], [[6, 7, 8], [9, 10]]),
        ({"max_length": 3, "truncation_mode": "keep_end"}, [], [[6, 7, 8], [9, 10]]),
        ({"max_prompt_length": 2}, [4, 5], [[6, 7, 8], [9, 10]]),
        ({"max_prompt_length": 2, "max_length": 3}, [4, 5], [[6], [9]]),
    ],
)
def test_what_truncation_keeps(plain, settings, prompt, completions):
    example = only([PAIR], plain, **settings)
    assert (list(example.prompt), [list(c.ids) for c in example.completions]) == (prompt, completions)


def test_masks_are_cut_with_their_tokens(plain):
    row = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]}
    start, end = (only([row], plain, max_length=2, truncation_mode=mode) for mode in ("keep_start", "keep_end"))
    assert (start.completions[0].ids, start.completions[0].mask) == ([4, 5], [False, True])
    assert (end.completions[0].ids, end.completions[0].mask) == ([6, 7], [False, True])


def test_rows_left_without_a_trained_token_are_dropped_counted_and_said(plain, caplog):
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}, {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    with caplog.at_level(logging.INFO):
        result = encoded([*rows, {"input_ids": [7], "labels": [7]}], plain, max_length=2)
    expected = EncodingReport(rows_in=3, rows=1, truncated=1, unscored=2, tokens=2, trained=1, longest=2)
    assert result.report == expected
    assert result.dataset[:] == {"prompt_ids": [[]], "completion_ids": [[[4, 5]]], "completion_mask": [[[True, True]]]}
    message = "train: 1 row, 2 tokens, 1 trained (50%), 1 truncated, 2 dropped (no token left to train on)."
    assert [r.getMessage() for r in caplog.records if r.name == "trl.data.encode"] == [message]
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("loss", ["truncated", "unscored", "identical", "overlong", "long"])
def test_a_report_of_a_loss_is_a_warning(caplog, loss):
    EncodingReport(rows=1, pretrained_length=8, **{loss: 1}).log()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_report_without_losses_is_no_warning(plain, caplog):
    with caplog.at_level(logging.INFO):
        encoded([{"text": "sky"}], plain)
    assert caplog.records[-1].levelno == logging.INFO


def test_tokens_count_a_shared_prompt_once(plain):
    report = encoded([PAIR], plain).report
    assert (report.tokens, report.trained) == (5 + 3 + 2, 3 + 2)


def test_prompts_are_not_reported_as_untrained(plain):
    assert str(encoded([{"prompt": "the sky"}], plain).report) == "train: 1 row, 3 tokens."


def test_equal_pairs_are_dropped(plain):
    rows = [{"prompt": "sky", "chosen": " blue", "rejected": other} for other in (" blue", " green")]
    report = encoded(rows, plain).report
    assert (report.rows, report.identical, report.dropped) == (1, 1, 1)
    assert "1 dropped (chosen equals rejected)" in str(report)
    with pytest.raises(DataError, match="Every row of 'train' has chosen equal to rejected"):
        encoded(rows[:1], plain)


def test_a_completion_emptied_by_truncation_drops_its_row(plain):
    rows = [{"prompt": "the sky is " * 9, "chosen": " blue", "rejected": " green"}, PAIR_TEXT]
    report = encoded(rows, plain, max_length=8).report
    assert (report.rows, report.unscored) == (1, 1)


def test_max_length_that_drops_everything(plain):
    rows = [{"prompt": "the sky is", "completion": " blue"}, {"prompt": "the sky is what", "completion": " green"}]
    shortest = len(plain.encode("the sky is blue")) + 1
    with pytest.raises(DataError) as error:
        encoded(rows, plain, max_length=2)
    assert (
        f"2 of 2 rows were dropped. max_length=2, max_prompt_length=None, and the shortest row has {shortest} tokens"
        in str(error.value)
    )
    assert "Raise max_length" in str(error.value)


def test_a_stream_is_encoded_alike_and_counted_as_it_goes(chatml):
    rows = [{"messages": ASK + BLUE}, {"messages": ASK + GREEN}]
    settings = EncodeSettings(assistant_only_loss=True)
    dataset = Dataset.from_list(rows)
    table = encode_dataset(dataset, chatml, settings=settings)
    stream = encode_dataset(dataset.to_iterable_dataset(), chatml, settings=settings)
    assert stream.report.rows_in == 0
    assert list(stream.dataset) == list(table.dataset)
    assert stream.report == table.report


def test_a_stream_drops_the_same_rows(plain):
    rows = Dataset.from_list([{"prompt": "sky", "completion": " blue"}, {"prompt": "sky" * 9, "completion": " blue"}])
    settings = EncodeSettings(max_length=8)
    table, stream = (encode_dataset(r, plain, settings=settings) for r in (rows, rows.to_iterable_dataset()))
    assert list(stream.dataset) == list(table.dataset)
    assert (len(table.dataset), stream.report.unscored) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_no_more_than_all_rows_are_the_first_ones(monkeypatch, stream):
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    monkeypatch.setattr(
        Dataset, "take", lambda self, n: self.select(range(n))
    )  # as before datasets 5: no more than there are
    rows = rows.to_iterable_dataset() if stream else rows
    assert [[row["text"] for row in first_rows(rows, n)] for n in (2, 5)] == [["a", "b"], ["a", "b", "c"]]


def test_a_stream_keeps_columns(plain):
    rows = [{"prompt": "sky", "completion": " blue", "label": False, "id": "a"}]
    settings = EncodeSettings(keep_columns=("label",))
    stream = encode_dataset(Dataset.from_list(rows).to_iterable_dataset(), plain, settings=settings).dataset
    assert [row.keys() for row in stream] == [{"prompt_ids", "completion_ids", "label"}]


def test_a_tokenizer_in_python():
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert list(tokenizer.encode("a")) == [100, 1]
    example = only([{"prompt": "a", "completion": "b"}], tokenizer)
    assert (example.prompt, example.completions[0].ids) == ([100], [101, 1])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    row = {"messages": ASK + BLUE}
    model_writes_headers = only([row], tokenizer, assistant_only_loss=True)
    assert texts(model_writes_headers, tokenizer)[1] == ["<|im_start|>assistant blue<|im_end|>"]
    tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    assert texts(only([row], tokenizer, assistant_only_loss=True), tokenizer)[1] == ["blue<|im_end|>"]


def test_processes_give_the_same(plain):
    rows = [{"text": f"the sky {i}"} for i in range(6)]
    assert encoded(rows, plain, num_proc=2).dataset[:] == encoded(rows, plain).dataset[:]


def test_the_second_encoding_comes_from_the_cache(plain, tmp_path, make):
    Dataset.from_list([{"text": "the sky"}]).save_to_disk(tmp_path)
    dataset = Dataset.load_from_disk(tmp_path)

    def cached(tokenizer, **settings):
        encode_dataset(dataset, tokenizer, settings=EncodeSettings(**settings))
        return len(list(tmp_path.glob("cache-*.arrow")))

    assert cached(plain) == 1
    plain(["a", "the sky"], padding=True, truncation=True, max_length=3)
    assert cached(plain) == 1
    assert cached(make.tokenizer()) == 1
    assert cached(plain, add_eos=False) == 2
    assert cached(make.tokenizer("chatml")) == 3
    assert cached(make.tokenizer(eos="<|im_end|>")) == 4
    assert tokenizer_key(plain) != tokenizer_key(make.tokenizer("chatml"))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_warnings_about_rows_come_again_with_the_cache(tmp_path, caplog, make, num_proc):
    rows = [{"messages": [{"role": "narrator", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4
    Dataset.from_list(rows).save_to_disk(tmp_path)
    dataset = Dataset.load_from_disk(tmp_path)
    for _ in range(2):
        caplog.clear()
        encode_dataset(dataset, make.tokenizer("chatml"), settings=EncodeSettings(num_proc=num_proc))
        assert caplog.text.count("the role 'narrator'") == 1


def test_reports_add_up():
    counts = {"tokens": 5, "trained": 2, "long": 1}
    a = EncodingReport("eval", rows_in=2, rows=1, truncated=1, unscored=1, **counts, longest=5, pretrained_length=4)
    b = EncodingReport("eval", **counts, longest=7, pretrained_length=4)
    twice = {name: 2 * count for name, count in counts.items()}
    assert a + b == EncodingReport(
        "eval", rows_in=2, rows=1, truncated=1, unscored=1, **twice, longest=7, pretrained_length=4
    )


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_rows_longer_than_the_model_is_made_for_are_counted_and_said_once(plain, caplog, kind):
    """Of a pair, the prompt with the longer completion counts: 4 + 3, and 4 + 5."""
    pairs = [(6, 4), (6, 3), (2, 8)] if kind is Dataset else [(2, 8), (2, 8), (2, 2)]
    rows = kind.from_generator(
        lambda: (
            {"prompt_ids": [7], "chosen_ids": [8] * chosen, "rejected_ids": [9] * rejected}
            for chosen, rejected in pairs
        )
    )
    made = encode_dataset(rows, plain, settings=EncodeSettings(pretrained_length=7))
    list(made.dataset)
    assert (made.report.long, made.report.longest) == ((1, 9) if kind is Dataset else (2, 9))
    (said,) = [r.getMessage() for r in caplog.records if "context of 7 tokens" in r.getMessage()]
    assert "the longest has 9: max_length=7" in said


# Bad input


def test_missing_columns(plain):
    with pytest.raises(DataError, match=r"(?s)columns \['promt'\] .*For 'promt': Did you mean 'prompt'"):
        encoded([{"promt": "sky"}], plain)


def test_wrong_types_name_row_and_column(plain, chatml):
    bad = {
        "Row 2, column 'text': expected a string, found None": [{"text": "sky"}, {"text": None}],
        "Row 1, column 'prompt': expected a string, found int 3": [{"prompt": 3, "completion": "sky"}],
        "Row 2, column 'messages': the conversation is empty": [{"messages": ASK}, {"messages": []}],
        "Row 1, column 'messages': message 1: expected {\"role\"": [{"messages": [{"content": "sky"}]}],
        "Row 1, column 'input_ids': expected a list of integers, found str 'sky'": [{"input_ids": "sky"}],
        "Row 1, column 'label': expected true (desirable) or false, found str": [
            {"prompt": "sky", "completion": " blue", "label": "good"}
        ],
        "Row 1, column 'labels': expected 1 labels, one per step, found list [True, False]": [
            {"prompt": "sky", "completions": ["a"], "labels": [True, False]}
        ],
        "Row 1, column 'labels': 1 values for the 2 tokens": [{"input_ids": [4, 5], "labels": [4]}],
        "Row 1, column 'labels': a label has to be the token id in 'input_ids' or -100": [
            {"input_ids": [4, 5], "labels": [5, 6]}
        ],
        "Row 1, column 'seq_lengths': every document has at least one token, found [2, 0]": [
            {"input_ids": [4, 5], "seq_lengths": [2, 0]}
        ],
        "Row 1, column 'seq_lengths': its documents have 3 tokens together, but the row has 2": [
            {"input_ids": [4, 5], "seq_lengths": [3]}
        ],
    }
    for message, rows in bad.items():
        with pytest.raises(DataError) as error:
            encoded(rows, chatml)
        assert message in str(error.value)


def test_rows_are_named_by_their_place_in_the_dataset(plain):
    rows = [{"text": "sky"}] * 1500 + [{"text": None}]
    with pytest.raises(DataError, match="Row 1501, column 'text'"):
        encoded(rows, plain)


def test_empty_dataset(plain):
    empty_stream = IterableDataset.from_generator(lambda: iter(()))
    for dataset in (Dataset.from_list([]), Dataset.from_dict({"text": []}), empty_stream):
        with pytest.raises(DataError, match="The dataset 'eval' is empty"):
            encode_dataset(dataset, plain, name="eval")


def test_answers_come_from_the_assistant(chatml):
    rows = [{"messages": ASK + BLUE}, {"messages": ASK + BLUE + ASK}, {"messages": ASK}]
    with pytest.raises(
        DataError, match=r"Row 3, column 'messages': it has no message of the assistant.* Its roles: user"
    ):
        encoded(rows, chatml, assistant_only_loss=True)
    assert len(examples(rows, chatml)) == 3
    first, second = examples(rows[:2], chatml, assistant_only_loss=True)
    assert sum(first.completions[0].mask) == sum(second.completions[0].mask)
    with pytest.raises(DataError, match=r"Row 1, column 'chosen': the conversation ends with 'user'"):
        encoded([{"prompt": ASK, "chosen": ASK, "rejected": BLUE}], chatml)


def test_a_template_that_cannot_be_masked_names_the_row(make):
    with pytest.raises(DataError, match=r"Row 1: The chat template of .* does not show which text the assistant wrote"):
        encoded([{"messages": ASK + BLUE}], make.tokenizer("rewrites"), assistant_only_loss=True)


def test_a_template_whose_prompt_is_not_kept(make):
    with pytest.raises(DataError, match=r"Row 1: .* renders a prompt differently once an answer follows"):
        encoded([{"prompt": ASK, "completion": BLUE}], make.tokenizer("rewrites"))


def test_conversations_without_a_template(plain):
    with pytest.raises(ConfigError, match="^The rows are conversations, .* has no chat template"):
        encoded([{"messages": ASK + BLUE}], plain)


def test_no_eos(make):
    with pytest.raises(DataError, match=r"has no EOS token.*Set eos_token to a token of its vocabulary"):
        encoded([{"text": "sky"}], make.tokenizer(eos=None))
    with pytest.raises(DataError, match=r"eos_token='<end>' is not in the vocabulary"):
        encoded([{"text": "sky"}], make.tokenizer(), eos_token="<end>")


def test_a_tokenizer_that_closes_texts_itself_needs_no_eos(make):
    tokenizer = make.tokenizer(eos=None)
    closes = processors.TemplateProcessing(single="<s> $A <pad>", special_tokens=[("<s>", 1), ("<pad>", 0)])
    tokenizer.backend_tokenizer.post_processor = closes
    example = only([{"prompt": "sky", "chosen": " blue", "rejected": " green"}], tokenizer)
    assert tokenizer.decode(example.prompt) == "<s>sky"
    assert [tokenizer.decode(c.ids) for c in example.completions] == [" blue<pad>", " green<pad>"]


def test_a_classifier_needs_no_end_of_text(make):
    tokenizer = make.tokenizer(eos=None)
    example = only([{"prompt": "sky", "completion": " blue"}], tokenizer, needs_eos=False)
    assert tokenizer.decode(example.completions[0].ids) == " blue"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positions": 9}, "Row 2: 4 tokens, but the model has 9 positions: set max_length to at most 9"),
        ({"embedded": 3}, r"Row 1: token '[^']+' \(\d+\) has no embedding; the model's embedding has 3 rows.*resize"),
    ],
)
def test_limits_of_the_model_are_those_of_rows(plain, settings, words):
    rows = [{"prompt": "sky", "completion": "s"}, {"prompt": "skyskyskysky", "completion": "s"}]
    lengths = [e["prompt_ids"] + e["completion_ids"][0] for e in encoded(rows, plain).dataset]
    with pytest.raises(DataError, match=words.replace("4 tokens", f"{len(lengths[1])} tokens")):
        encoded(rows, plain, **settings)
    if "positions" in settings:
        assert len(encoded(rows, plain, max_length=9, **settings).dataset) == 2
    else:
        last = max(token for ids in lengths for token in ids)
        assert len(encoded(rows, plain, embedded=last + 1).dataset) == 2
        with pytest.raises(DataError, match="has no embedding"):
            encoded(rows, plain, embedded=last)


def test_prompts_leave_room_for_a_completion(plain):
    rows = [{"prompt": "sky"}, {"prompt": "skyskyskysky"}]
    lengths = [len(e["prompt_ids"]) for e in encoded(rows, plain, kind="prompt_only").dataset]
    context = {"kind": "prompt_only", "context": lengths[1]}
    with pytest.raises(DataError, match=f"Row 2: its prompt has {lengths[1]} tokens, and the model's context is"):
        encoded(rows, plain, **context)
    assert len(encoded(rows, plain, max_prompt_length=lengths[1] - 1, **context).dataset) == 2
    with pytest.raises(DataError, match="Row 1 has no prompt: the column 'prompt' is empty. Give"):
        encoded([{"prompt": ""}], plain, kind="prompt_only", needs_prompt=True)


def test_losses_that_rows_do_not_allow(plain, chatml):
    with pytest.raises(DataError, match="assistant_only_loss=True needs conversations, but column 'text' holds text"):
        encoded([{"text": "sky"}], plain, assistant_only_loss=True)
    with pytest.raises(DataError, match="completion_only_loss=True needs columns 'prompt' and 'completion'"):
        encoded([{"messages": ASK + BLUE}], chatml, completion_only_loss=True)
    with pytest.raises(DataError, match="needs a column 'assistant_masks'"):
        encoded([{"input_ids": [4, 5]}], plain, assistant_only_loss=True)


def test_unknown_settings():
    with pytest.raises(ConfigError, match=r"Unknown truncation_mode 'keep_strat'\. Did you mean 'keep_start'"):
        EncodeSettings(truncation_mode="keep_strat")
    with pytest.raises(ConfigError, match=r"Unknown row kind 'preferences'\. Did you mean 'preference'"):
        EncodeSettings(kind=("preferences",))
    with pytest.raises(ConfigError, match="max_length=0: give 1 or more"):
        EncodeSettings(max_length=0)


def test_content_in_parts(chatml):
    parts = [{"type": "text", "text": "s"}, {"type": "text", "text": "ky"}]
    ask = {"role": "user", "content": parts}
    expected = only([{"messages": [{"role": "user", "content": "sky"}, *BLUE]}], chatml)
    assert only(
        [{"messages": [ask, {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]}], chatml
    ) == (expected)


def test_pictures_are_refused(chatml):
    picture = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
    with pytest.raises(
        DataError, match=r"[Rr]ow 1.* message 1: content has to be text, or a list of parts of type text"
    ):
        only([picture], chatml)
    with pytest.raises(
        DataError, match=r"columns \['images'\] hold images.*processing_class.*remove_columns\(\['images'\]\)"
    ):
        only([{"text": "sky", "images": "a.png"}], chatml)
