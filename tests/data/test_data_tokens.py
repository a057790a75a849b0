"""What a tokenizer puts around a text, found out on a letter."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from tests.conftest import make_tokenizer
from trl.data.tokens import TextEncoder


def encoder(eos: str, template: str | None) -> TextEncoder:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = eos
    if template is not None:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", eos)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return TextEncoder(tokenizer)


@pytest.mark.parametrize("eos", ["</s>", "a", "b"])
@pytest.mark.parametrize(
    ("around", "adds_eos"), [(None, False), ("<s> $A", False), ("$A {}", True), ("<s> $A {}", True)]
)
def test_prompts_lose_the_eos_that_was_added_and_no_other(eos, around, adds_eos):
    """Also where a letter is the token that ends a text."""
    made = encoder(eos, around and around.format(eos))
    begins = [1] if around and around.startswith("<s>") else []
    assert made.closing == adds_eos
    assert made.prompts(["ba"], add_special_tokens=True) == [begins + made.ids(["ba"])[0]]
