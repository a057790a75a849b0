"""Rendering conversations, and which of their tokens the assistant wrote."""

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.data.chat_families import render_chat
from trl.data.chat import (
    ChatTemplate,
    apply_chat_template,
    maybe_apply_chat_template,
)
from trl.data.chat_formats import clone_chat_template, setup_chat_format
from trl.errors import ConfigError, DataError

SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
QUESTION = "what is the sky"


@pytest.fixture
def dialogue(make):
    return [make.user(QUESTION), make.assistant("blue"), make.user("and you"), make.assistant("fine")]


def trained_text(messages, tokenizer, **options):
    """The runs of text that are trained on."""
    ids, mask = render_chat(messages, tokenizer, **options)
    runs, open_run = [], False
    for token, trained in zip(ids, mask, strict=True):
        if trained:
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", ["chatml", "marked", "forgets_thoughts", "opens_thoughts"])
def test_answers_and_their_closing_token_are_trained(make, dialogue, template):
    assert trained_text(dialogue, make.tokenizer(template)) == ["blue<|im_end|>", "fine<|im_end|>"]


def test_marked_and_unmarked_templates_agree_on_ids_and_mask(make, dialogue):
    assert render_chat(dialogue, make.tokenizer("marked")) == render_chat(dialogue, make.tokenizer("chatml"))


def test_ids_are_those_of_the_whole_rendering(make, dialogue):
    tokenizer = make.tokenizer("chatml")
    whole = tokenizer.apply_chat_template(dialogue, return_dict=False)
    assert render_chat(dialogue, tokenizer)[0] == whole


def test_mask_agrees_with_that_of_transformers_for_marked_templates(make, dialogue):
    tokenizer = make.tokenizer("marked")
    theirs = tokenizer.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render_chat(dialogue, tokenizer)
    assert (ids, mask) == (theirs["input_ids"], [bool(m) for m in theirs["assistant_masks"]])


def test_brackets_without_a_header(make, dialogue):
    assert trained_text(dialogue, make.tokenizer("inst")) == [" blue </s>", " fine </s>"]


def test_a_token_that_closes_the_whole_conversation(make, dialogue):
    learned = trained_text(dialogue, make.tokenizer("closes_the_whole"))
    assert learned == ["blue<|im_end|>", "fine<|im_end|>\n</s>"]


def test_a_last_turn_that_is_closed_by_another_token(make, dialogue):
    learned = trained_text(dialogue, make.tokenizer("closes_the_last_otherwise"))
    assert learned == ["blue<|im_end|>", "fine</s>"]


def test_a_tokenizer_that_writes_leading_spaces(make, dialogue):
    tokenizer = make.sentencepiece_like()
    tokenizer.chat_template = make.tokenizer("inst").chat_template
    assert [text.strip() for text in trained_text(dialogue, tokenizer)] == ["blue </s>", "fine </s>"]


def test_without_a_token_that_ends_turns_their_line_end_is_trained(make, dialogue):
    tokenizer = make.tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    assert trained_text(dialogue, tokenizer) == ["blue\n", "fine\n"]


def test_a_turn_that_is_rewritten_later_is_found_by_its_closing_token(make, dialogue):
    thinking = [*dialogue[:1], make.assistant("<think>hm</think>blue"), *dialogue[2:]]
    assert trained_text(thinking, make.tokenizer("forgets_thoughts")) == ["blue<|im_end|>", "fine<|im_end|>"]


def test_the_last_thought_is_trained(make, dialogue):
    thinking = [*dialogue[:3], make.assistant("<think>hm</think>fine")]
    last = trained_text(thinking, make.tokenizer("forgets_thoughts"))[-1]
    assert last == "<think>hm</think>fine<|im_end|>"


def test_a_header_that_opens_a_thought_is_cut_at_a_line_end_though_the_answer_begins_alike(make):
    tokenizer = make.tokenizer("opens_thoughts")
    assert trained_text([make.user("hello"), make.assistant("<b>yes")], tokenizer) == ["<b>yes<|im_end|>"]


def test_eos_after_a_mark_is_trained(make, dialogue):
    tokenizer = make.tokenizer("marked", eos="<|im_end|>")
    inside, outside = "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(inside, outside)
    assert trained_text(dialogue, tokenizer) == ["blue<|im_end|>", "fine<|im_end|>"]


def test_pad_that_is_eos_is_trained(make, dialogue):
    tokenizer = make.tokenizer("chatml", eos="<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    assert trained_text(dialogue, tokenizer)[-1] == "fine<|im_end|>"


@pytest.mark.parametrize("answer", ["\n\nyes", " yes", "ly", "\nyes \n"])
def test_the_border_is_where_the_generation_prompt_ends_in_tokens(make, answer):
    tokenizer = make.tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n\n").replace(
        "{{ m.role }}\n", "{{ m.role }}\n\n"
    )
    messages = [make.user("hello"), make.assistant(answer)]
    header = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    ids, mask = render_chat(messages, tokenizer)
    assert ids[: len(header)] == header
    assert mask[: len(header) + 1] == [False] * len(header) + [True]


def test_a_conversation_without_an_assistant_has_nothing_to_train_on(make):
    ids, mask = render_chat([make.user("hello")], make.tokenizer("chatml"))
    assert len(mask) == len(ids)
    assert not any(mask)


def test_a_template_that_cannot_be_masked(make, dialogue):
    with pytest.raises(DataError, match=r"does not show which text the assistant wrote.*\{% generation %\}"):
        render_chat(dialogue, make.tokenizer("rewrites"))


def test_no_chat_template(make, dialogue):
    with pytest.raises(ConfigError, match=r"has no chat template\. .*\(--chat_template_path\): the name .*\.jinja"):
        render_chat(dialogue, make.tokenizer())


def test_an_error_of_the_template_names_the_roles(make):
    tokenizer = make.tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"cannot render messages of roles user, user: roles must alternate"):
        ChatTemplate(tokenizer).render([make.user("a"), make.user("b")])


def test_tools_and_template_arguments_reach_the_template(make):
    tokenizer = make.tokenizer("chatml")
    tokenizer.chat_template = "{{ tools[0].function.name if tools else 'none' }} {{ mood }} {{ messages[0].content }}"
    template = ChatTemplate(tokenizer, template_kwargs={"mood": "calm"})
    tool = {"type": "function", "function": {"name": "add", "description": None}}
    assert template.render([make.user("hello")])[0] == "none calm hello"
    row = {"tools": [tool], "chat_template_kwargs": {"mood": "glad", "other": None}}
    assert template.render([make.user("hello")], row)[0] == "add glad hello"
    other = {"tools": '[{"function": {"name": "sum"}}]'}
    assert template.render([make.user("hello")], other)[0] == "sum calm hello"
    template = ChatTemplate(tokenizer, tools=[tool], template_kwargs={"mood": "calm"})
    found = [template.render([make.user("hello")], row)[0] for row in ({}, other)]
    assert found == ["add calm hello", "sum calm hello"]
    with pytest.raises(DataError, match="column 'chat_template_kwargs': expected a mapping, found a list"):
        template.render([make.user("hello")], {"chat_template_kwargs": [["mood", "glad"]]})


def test_a_template_argument_that_is_not_used_is_said(make, caplog):
    ChatTemplate(make.tokenizer("chatml"), template_kwargs={"add_generation_promt": True})
    (record,) = caplog.records
    assert "does not use 'add_generation_promt'. Did you mean 'add_generation_prompt'?" in record.getMessage()


def test_answers_of_a_prompt_that_have_other_headers(make):
    """Only one of them has a thought, with which the generation prompt begins: it is part of the answers, not of the prompt."""
    tokenizer = make.tokenizer("opens_thoughts")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content.split('</think>')[-1] }}", "{{ m.content }}"
    )
    answers = ["<think>\nhm</think>yes", "<b>no", "maybe"]
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        given = [[make.assistant(answers[i])] for i in order]
        prompt, found = ChatTemplate(tokenizer).answers([make.user("hello")], given)
        assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert found == [f"{answers[i]}<|im_end|>\n" for i in order]


def test_a_template_that_ends_no_turn_is_said(make, caplog):
    tokenizer = make.tokenizer("chatml")
    template = ChatTemplate(tokenizer)
    template.answers([make.user("hello")], [[make.assistant("yes")]])
    assert not caplog.records
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    template = ChatTemplate(tokenizer)
    for _ in range(2):
        template.answers([make.user("hello")], [[make.assistant("yes")]])
    (record,) = caplog.records
    assert "writes no token that ends a turn" in record.getMessage()


def test_apply_chat_template_to_every_kind(make):
    tokenizer = make.tokenizer("chatml")
    ask, blue, green = [make.user("sky")], [make.assistant("blue")], [make.assistant("green")]
    header = "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        "messages": ({"messages": ask + blue}, {"text": f"{header}blue<|im_end|>\n"}),
        "prompt": ({"prompt": ask}, {"prompt": header}),
        "open prompt": ({"prompt": ask + blue}, {"prompt": f"{header}blue"}),
        "completion": (
            {"prompt": ask, "completion": blue, "label": True},
            {"prompt": header, "completion": "blue<|im_end|>\n", "label": True},
        ),
        "preference": (
            {"prompt": ask, "chosen": blue, "rejected": green},
            {"prompt": header, "chosen": "blue<|im_end|>\n", "rejected": "green<|im_end|>\n"},
        ),
        "implicit": (
            {"chosen": ask + blue, "rejected": ask + green},
            {"chosen": f"{header}blue<|im_end|>\n", "rejected": f"{header}green<|im_end|>\n"},
        ),
    }
    for row, rendered in expected.values():
        assert apply_chat_template(row, tokenizer) == rendered
        assert maybe_apply_chat_template(row, processing_class=tokenizer) == rendered


def test_maybe_apply_chat_template_leaves_text(make):
    row = {"prompt": "sky", "completion": " blue"}
    assert maybe_apply_chat_template(row, make.tokenizer()) is row


def test_a_prompt_must_not_end_with_the_system(make):
    with pytest.raises(DataError, match="ends with a message of role 'system'"):
        apply_chat_template({"prompt": [{"role": "system", "content": "be"}]}, make.tokenizer("chatml"))


def base_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_clone_chat_template(make):
    tokenizer, model = base_tokenizer(), LlamaForCausalLM(LlamaConfig(vocab_size=3, **SHAPE))
    source = make.tokenizer("chatml", eos="<|im_end|>")
    model, tokenizer, added = clone_chat_template(model, tokenizer, source, resize_to_multiple_of=8)
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer.convert_ids_to_tokens(added) == ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.get_input_embeddings().num_embeddings == 8
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == 8  # so that every id that the model samples is a token
    with pytest.raises(DataError, match="no chat template to clone"):
        clone_chat_template(model, tokenizer, make.tokenizer())


@pytest.mark.parametrize(("rows", "multiple", "left"), [(3, None, 7), (16, 8, 16), (7, 8, 7)])
def test_clone_chat_template_adds_no_more_rows_than_are_needed(make, rows, multiple, left):
    tokenizer, model = base_tokenizer(), LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SHAPE))
    source = make.tokenizer("chatml")
    model, tokenizer, added = clone_chat_template(model, tokenizer, source, resize_to_multiple_of=multiple)
    assert (model.get_input_embeddings().num_embeddings, len(tokenizer)) == (left, 7)
    assert added == [3, 4, 5, 6]


def test_chatml_for_a_base_model(make, dialogue):
    tokenizer, model = base_tokenizer(), LlamaForCausalLM(LlamaConfig(vocab_size=3, **SHAPE))
    model, tokenizer = setup_chat_format(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 5
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 4, 4)
    marked = make.tokenizer("chatml")
    expected = render_chat(dialogue, marked)
    marked.chat_template = tokenizer.chat_template
    assert render_chat(dialogue, marked) == expected
    with pytest.raises(DataError, match="has a chat template already"):
        setup_chat_format(model, tokenizer)
    with pytest.raises(ConfigError, match="Unknown format 'chatmi'. Did you mean 'chatml'"):
        setup_chat_format(model, base_tokenizer(), format="chatmi")
