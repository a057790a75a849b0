"""What a preview shows, with and without colours."""

import io
import re

import pytest
from rich.console import Console

from tests.data.chat_families import render_chat
from trl.counts import counted
from trl.data.preview import preview_examples
from trl.types import Completion, Example


@pytest.fixture
def tokenizer(make):
    return make.tokenizer("chatml", eos="<|im_end|>")


@pytest.fixture
def chat(make, tokenizer):
    ids, mask = render_chat([make.user("sky"), make.assistant("blue\n[bold]yes")], tokenizer)
    return Example((), (Completion(ids, mask),))


def shown(examples, tokenizer, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    preview_examples(examples, tokenizer, console=console)
    return console.file.getvalue()


def test_trained_text_stands_in_brackets_without_colours(chat, tokenizer):
    lines = [line.rstrip() for line in shown([chat], tokenizer).splitlines()]
    assert lines[0] == "⟦trained⟧ ignored  ↵ line end"
    assert lines[1].startswith(f"row 1: {chat.tokens} tokens, ")
    assert lines[2:7] == [
        "<|im_start|>user↵",
        "sky<|im_end|>↵",
        "<|im_start|>assistant↵",
        "⟦blue↵",
        "[bold]yes<|im_end|>⟧↵",
    ]
    assert lines[1].rstrip(" ─").endswith(f", {sum(chat.completions[0].mask)} trained")


def test_a_prompt_alone_has_nothing_to_train(tokenizer):
    lines = shown([Example(tuple(tokenizer.encode("sky")), (Completion(()),))], tokenizer).splitlines()
    assert lines[1].startswith("row 1: 2 tokens ─")


def test_the_completions_of_a_pair_have_names(tokenizer):
    pair = Example(tuple(tokenizer.encode("sky")), tuple(Completion(tokenizer.encode(t)) for t in (" blue", " no")))
    output = io.StringIO()
    preview_examples([pair], tokenizer, console=Console(file=output), sides=("chosen", "rejected"))
    assert re.findall(r"^(\w+): \d+ token", output.getvalue(), re.MULTILINE) == ["chosen", "rejected"]


def test_colours_replace_brackets_in_a_terminal(chat, tokenizer):
    output = shown([chat], tokenizer, force_terminal=True, color_system="standard")
    assert "⟦" not in output
    assert "\x1b[32mblue↵" in output
    assert "\x1b[1;7;32m<|im_end|>" in output
    assert "\x1b[1;7;90m<|im_start|>" in output


def test_no_color_counts_as_no_colours(chat, tokenizer):
    assert "⟦blue↵" in shown([chat], tokenizer, force_terminal=True, no_color=True)


def test_several_completions_stand_below_their_prompt_with_signals(tokenizer):
    ids = tokenizer.encode
    sides = (Completion(ids(" blue"), None, {"margin": 1.5}), Completion(ids(" green"), None, {"score": [0.25, 1.0]}))
    output = shown([Example(ids("the sky"), sides)], tokenizer).splitlines()
    assert [line.rstrip() for line in output[2:-1]] == [
        "the sky",
        f"completion 1 of 2: {counted(len(ids(' blue')), 'token')}",
        "⟦ blue⟧",
        "margin=1.5",
        f"completion 2 of 2: {counted(len(ids(' green')), 'token')}",
        "⟦ green⟧",
        "score=[0.25, 1]",
    ]


def test_the_first_token_of_a_row_is_shown_as_ignored(tokenizer):
    output = shown([Example((), (Completion(tokenizer.encode("sky blue")),))], tokenizer)
    assert "⟦" in output
    assert not output.splitlines()[2].startswith("⟦")
