"""KTOTrainer: the divergence is that of the whole window, BCO's shift outlives a checkpoint, pairs are taken apart."""

from __future__ import annotations

import logging
import math

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.conftest import make_tokenizer
from trl.errors import ConfigError, DataError
from trl.models.reference import Precomputed
from trl.trainers.kto import BCOConfig, BCOTrainer, KTOConfig, KTOTrainer, keyed, mismatched
from trl.types import Completion, Example

COLOURS = ["red", "green", "blue", "cyan", "pink", "grey", "teal", "gold"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labelled(labels=(True, False) * 4) -> Dataset:
    columns = {"prompt": [f"colour {c}" for c in COLOURS], "completion": [f" {c} it is" for c in COLOURS]}
    return Dataset.from_dict({**columns, "label": list(labels)})


def pairs() -> Dataset:
    chosen, rejected = [f"{c} it is" for c in COLOURS], [f"no {c}" for c in COLOURS]
    return Dataset.from_dict({"prompt": [f"colour {c} " for c in COLOURS], "chosen": chosen, "rejected": rejected})


def make_trainer(model, tmp_path, rows=None, *, peft_config=None, ref_model=None, evaluation=None, **changed):
    options = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        **changed,
    }
    return KTOTrainer(
        model,
        args=KTOConfig(**options),
        train_dataset=labelled() if rows is None else rows,
        eval_dataset=evaluation,
        tokenizer=make_tokenizer(),
        ref_model=ref_model,
        peft_config=peft_config,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


GIVEN = {
    "model": (lambda make: make("llama"), {}),
    "encoder-decoder": (lambda make: make("bart"), {}),
    "new adapter": (lambda make: make("llama"), {"peft_config": LORA}),
    "given adapter": (lambda make: get_peft_model(make("llama"), LORA), {}),
    "precomputed": (lambda make: make("llama"), {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize(("loss_type", "first"), [("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco", math.log(2))])
def test_first_loss_where_policy_is_reference(make_model, tmp_path, case, loss_type, first):
    """h = 0, so 1 − σ(0) = ½ and −log σ(0) = ln 2."""
    make, given = GIVEN[case]
    trainer = make_trainer(make(make_model), tmp_path, loss_type=loss_type, **given)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(first, abs=1e-6)
    assert losses(trainer)[1] != pytest.approx(first, abs=1e-4)
    metrics = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"}
    log = trainer.state.log_history[1]
    assert metrics <= log.keys()
    assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"])


def test_bco_under_its_own_name(make_model, tmp_path):
    args = BCOConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", logging_steps=1, disable_tqdm=True)
    trainer = BCOTrainer(make_model("llama"), args=args, train_dataset=labelled(), processing_class=make_tokenizer())
    trainer.train()
    assert losses(trainer) == [pytest.approx(math.log(2), abs=1e-6)]


def plain_logprob(model, prompt, ids):
    logits = model(torch.tensor([[*prompt, *ids]], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids].sum().item()


def test_loss_and_divergence_against_plain_forwards(make_model, tmp_path):
    model, reference = make_model("llama"), make_model("llama", seed=1)
    given = {"ref_model": reference, "desirable_weight": 1.1, "beta": 0.2, "max_steps": 1}
    trainer = make_trainer(model, tmp_path, **given)
    rows = [(row["prompt_ids"], row["completion_ids"][0], row["label"]) for row in trainer.train_dataset]

    def logratio(prompt, ids):
        return plain_logprob(model, prompt, ids) - plain_logprob(reference, prompt, ids)

    examples = [Example(prompt, (Completion(ids),)) for prompt, ids, _ in rows]
    divergences = [logratio(e.prompt, e.completions[0].ids) for e in mismatched(examples)]
    kl = max(0.0, sum(divergences) / len(divergences))
    expected = []
    for prompt, ids, label in rows:
        sign, weight = (1, 1.1) if label else (-1, 1.0)
        expected.append(weight / (1 + math.exp(0.2 * sign * (logratio(prompt, ids) - kl))))
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert losses(trainer)[0] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_mismatched_keeps_completions_and_changes_every_prompt():
    examples = [Example([i % 3, 7], (Completion([i]),)) for i in range(6)]
    own = {example.completions[0].ids[0]: list(example.prompt) for example in examples}
    found = mismatched(examples)
    assert sorted(e.completions[0].ids[0] for e in found) == list(range(6))
    assert all(list(e.prompt) != own[e.completions[0].ids[0]] for e in found)
    assert mismatched(examples[::-1]) == found[::-1]
    halves = [mismatched(half, keyed(examples)) for half in (examples[:2], examples[2:])]
    assert [*halves[0], *halves[1]] == found, "split over processes"
    assert mismatched(examples[:1]) == []


def test_pairs_are_taken_apart(make_model, tmp_path):
    trainer = make_trainer(make_model("llama"), tmp_path, pairs(), evaluation=pairs())
    assert len(trainer.train_dataset) == 16
    assert sum(trainer.train_dataset["label"][:]) == 8
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    assert found["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    implicit = pairs().map(
        lambda row: {n: row["prompt"] + row[n] for n in ("chosen", "rejected")}, remove_columns="prompt"
    )
    assert len(make_trainer(make_model("llama"), tmp_path, implicit).train_dataset) == 16


def test_precomputing_keeps_the_reference_for_the_divergence(make_model, tmp_path):
    found = []
    for precompute in (False, True):
        trainer = make_trainer(make_model("llama"), tmp_path, precompute_ref_log_probs=precompute)
        trainer.train()
        found.append(losses(trainer))
    assert isinstance(trainer.reference, Precomputed)
    assert trainer.reference.other is not None
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    other = make_trainer(make_model("llama"), tmp_path, precompute_ref_log_probs=True, loss_type="apo_zero_unpaired")
    assert other.reference.other is None


# ---- BCO ----


def test_shift_is_that_of_the_steps_before_and_part_of_a_checkpoint(make_model, tmp_path):
    given = {"loss_type": "bco", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_model("llama"), tmp_path, **given)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    sums = dict.fromkeys(("chosen", "rejected"), 0.0)
    for step, log in enumerate(logs):
        shift = sum(sums.values()) / 2 / max(step, 1)
        assert log["delta"] == pytest.approx(shift, rel=1e-4, abs=1e-6)
        sums = {side: value + log[f"rewards/{side}"] for side, value in sums.items()}
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert torch.load(checkpoint / "trl_state.pt", weights_only=True)["reward_shift"]["desirable_count"] == 8
    resumed = make_trainer(make_model("llama"), tmp_path, **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-1] == losses(trainer)[-1]


# ---- weights ----


def test_recommended_weights(make_model, tmp_path, caplog):
    rows = labelled([True] * 6 + [False] * 2)
    with caplog.at_level(logging.WARNING, logger="trl.trainers.kto"):
        make_trainer(make_model("llama"), tmp_path, rows)
        assert "6 completions are desirable and 2 are not" in caplog.text
        assert "Set desirable_weight between 0.33 and 0.44, or undesirable_weight between 2.25 and 3.00" in caplog.text
        caplog.clear()
        make_trainer(make_model("llama"), tmp_path, rows, undesirable_weight=2.5)
        make_trainer(make_model("llama"), tmp_path, rows, loss_type="bco")
        assert not caplog.text


# ---- bad input ----

BAD_ROWS = {
    "label is text": (
        {"prompt": ["a"], "completion": ["b"], "label": ["good"]},
        r"Row 1, column 'label': expected true \(desirable\) or false, found str 'good'",
    ),
    "label is missing": (
        {"prompt": ["a", "c"], "completion": ["b", "d"], "label": [True, None]},
        r"Row 2, column 'label': expected true \(desirable\) or false, found None",
    ),
    "no prompt": ({"completion": ["b"], "label": [True]}, r"unpaired_preference: prompt, completion, label"),
    "conversations": (
        {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], "label": [True]},
        r"'messages' has to be split into a prompt and the last message, the completion.*'kto_tag'",
    ),
    "empty prompt": (
        {"prompt": ["a", ""], "completion": ["b", "c"], "label": [True, False]},
        "Row 2 has no prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(make_model, tmp_path, case):
    rows, words = BAD_ROWS[case]
    with pytest.raises(DataError, match=words):
        make_trainer(make_model("llama"), tmp_path, Dataset.from_dict(rows))


def test_emptied_by_truncation(make_model, tmp_path):
    columns = {"prompt": ["a" * 30, "b", "c"], "completion": ["x", "y", "z"], "label": [True, True, False]}
    trainer = make_trainer(make_model("llama"), tmp_path, Dataset.from_dict(columns), max_length=20)
    assert "1 dropped (no token left to train on)" in str(trainer.encoded["train"].report)


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"a step has only one row"):
        KTOConfig(per_device_train_batch_size=1)
    with pytest.raises(ConfigError, match=r"Unknown loss_type 'ktoo'. Did you mean 'kto'"):
        KTOConfig(loss_type="ktoo")
    with pytest.raises(ConfigError, match="desirable_weight=-1"):
        KTOConfig(desirable_weight=-1)
    with pytest.raises(ConfigError, match="desirable_weight and undesirable_weight: every weight is 0"):
        KTOConfig(desirable_weight=0.0, undesirable_weight=0.0)


def test_a_row_of_each_of_two_processes_is_a_step_of_two(monkeypatch):
    monkeypatch.setattr(KTOConfig, "world_size", 2)
    monkeypatch.setattr("trl.trainers.config.check_processes", lambda args: None)
    KTOConfig(per_device_train_batch_size=1)
