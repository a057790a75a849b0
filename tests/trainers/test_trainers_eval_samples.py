"""Samples at evaluations: what is given of a row, and what is kept."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl.errors import ConfigError
from trl.report.record import read_samples
from trl.trainers.dpo import DPOConfig, DPOTrainer
from trl.trainers.eval_samples import OPENING, prompt_of
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.types import Completion, Example

PAIRS = Dataset.from_list([{"prompt": "Is it far?", "chosen": " Two hours.", "rejected": " Yes."}] * 3)
OPTIONS = {"report_to": "none", "html_report": False, "eval_samples": 2, "eval_samples_max_new_tokens": 3}


@pytest.mark.parametrize(
    ("example", "ids"),
    [
        (Example([1, 2], (Completion([3, 4]),)), [1, 2]),
        (Example([], (Completion([1, 2, 3, 4, 5, 6], [0, 1, 1, 0, 1, 1]),)), [1, 2, 3, 4]),  # the last turn is left out
        (Example([], (Completion(range(100)),)), list(range(OPENING))),
        (Example([], (Completion([1, 2, 3]),)), [1, 2]),
    ],
)
def test_what_is_given_of_a_row(example, ids):
    assert list(prompt_of(example).ids) == ids


def test_samples_are_in_the_report_by_step(make_model, tmp_path):
    args = DPOConfig(str(tmp_path), **OPTIONS)
    trainer = DPOTrainer(
        make_model("llama"), None, args, train_dataset=PAIRS, eval_dataset=PAIRS, processing_class=make_tokenizer()
    )
    trainer.evaluate()
    trainer.state.global_step = 5
    trainer.evaluate()
    samples = read_samples(tmp_path / "completions")
    assert {step: len(rows) for step, rows in samples.items()} == {0: 2, 5: 2}
    assert samples[0][0].prompt == "Is it far?"
    assert samples[0] == samples[5]


def test_what_cannot_be_sampled(make_model, tmp_path):
    with pytest.raises(ConfigError, match="eval_samples=-1"):
        SFTConfig(str(tmp_path), eval_samples=-1)
    args = SFTConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ConfigError, match="give eval_dataset as well"):
        SFTTrainer(
            make_model("llama"),
            args,
            train_dataset=PAIRS.select_columns(["prompt"]).add_column("completion", [" a"] * 3),
            processing_class=make_tokenizer(),
        )
