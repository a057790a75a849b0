"""Inputs that cannot work: each ends with a status above 0, and with words that name what was given and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bad_inputs import TRIALS, message, prepare, run, save_tiny_model

from trl.cli.commands import methods
from trl.cli.other_words import AXOLOTL, COMMON, LLAMA_FACTORY, RECIPES, TOOLS

OPTIONS = {option.name for method in methods().values() for option in method.options()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    prepare(folder, save_tiny_model)
    return folder


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The environment, which the command changes, as it was afterwards; and no network."""
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: " ".join(trial.words.split())[-50:])
def test_nobody_needs_to_read_a_traceback(trial, folder):
    outcome = run(trial, folder)
    assert outcome.status > 0
    said = message(outcome)
    assert said.startswith("trl: error: ")
    assert "Traceback" not in outcome.told
    assert [name for name in trial.names if name not in said] == []
    assert len(said) < 2500


@pytest.mark.parametrize("words", [COMMON, AXOLOTL, LLAMA_FACTORY, RECIPES])
def test_what_is_suggested_exists(words):
    """The first word of a counterpart is an option, "env", a command, or the file says that nothing takes its place."""
    for key, told in words.items():
        first = told.replace(",", " ").replace(":", " ").split()
        assert not told or first[0] in OPTIONS | {"another", "env", "rows"}, f"{key}: {told}"


def test_marks_of_other_tools_are_no_options_here():
    assert not OPTIONS & {mark for tool in TOOLS for mark in tool.marks}
