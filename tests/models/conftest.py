"""Folders of models, shared by tests of models."""

import pytest
import torch

from tests.conftest import MODELS, make_tokenizer


@pytest.fixture
def base(tmp_path) -> str:
    """The folder of a tiny Llama and its tokenizer."""
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")
