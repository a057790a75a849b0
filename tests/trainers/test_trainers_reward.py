"""RewardTrainer: rewards are those of plain `transformers`, every kind of row trains, and bad input is told."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)

from tests.conftest import BART, GPT2, OPT, VOCABULARY, WIDTHS, make_tokenizer
from trl.data.layout import lay_out
from trl.errors import ConfigError, DataError, ModelError
from trl.models.layouts import choose_layout
from trl.models.rewards import score_rewards
from trl.rewards.model import RewardModel
from trl.trainers.reward import RewardConfig, RewardTrainer, print_mistakes, snippet, worst
from trl.types import Completion, Example

BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CLASSIFIERS = {
    "llama": lambda **kw: LlamaForSequenceClassification(LlamaConfig(**{**WIDTHS, "num_labels": 1, **kw})),
    "gpt2": lambda **kw: GPT2ForSequenceClassification(GPT2Config(**{**GPT2, "num_labels": 1, **kw})),
    "opt": lambda **kw: OPTForSequenceClassification(OPTConfig(**{**OPT, "num_labels": 1, **kw})),
    "bert": lambda **kw: BertForSequenceClassification(
        BertConfig(**{**BERT, "num_attention_heads": 4, "num_labels": 1, **kw})
    ),
    "bart": lambda **kw: BartForSequenceClassification(BartConfig(**{**BART, "num_labels": 1, **kw})),
}
EXAMPLES = (
    Example([5, 3, 8], (Completion([4, 9, 2]), Completion([7, 12, 6, 3, 2]))),
    Example([], (Completion([3, 9, 4, 5, 8, 2]),)),
    Example([11, 12, 13, 14], (Completion([2]),)),
)


def make(name="llama", **config):
    torch.manual_seed(0)
    return CLASSIFIERS[name](**config).eval()


def pairs(**columns) -> Dataset:
    rows = {"prompt": ["say ", "tell "] * 4, "chosen": [f"yes {i}" for i in range(8)], "rejected": ["no"] * 8}
    return Dataset.from_dict({**rows, **columns})


def scored() -> Dataset:
    return Dataset.from_dict({"text": ["good", "bad", "so so", "fine"], "score": [1.0, -1.0, 0.0, 0.5]})


def steps() -> Dataset:
    labels = [[True, False], [True], [False, False]]
    return Dataset.from_dict(
        {"prompt": ["a", "b", "c"], "completions": [["x", "y"], ["z"], ["u", "v"]], "labels": labels}
    )


def tokenized() -> Dataset:
    columns = {"input_ids_chosen": [[5, 6, 7, 2, 0]], "attention_mask_chosen": [[1, 1, 1, 1, 0]]}
    return Dataset.from_dict({**columns, "input_ids_rejected": [[5, 9, 2]], "attention_mask_rejected": [[1, 1, 1]]})


def make_trainer(tmp_path, rows, model=None, evaluation=None, peft_config=None, tokenizer=None, **changed):
    options = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 30,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        **changed,
    }
    return RewardTrainer(
        model=make() if model is None else model,
        args=RewardConfig(**options),
        train_dataset=rows,
        eval_dataset=evaluation,
        tokenizer=tokenizer or make_tokenizer(),
        peft_config=peft_config,
    )


# ---- the numbers ----


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rewards_are_those_of_the_plain_forward(name):
    model = make(name)
    expected = [
        model(torch.tensor([[*example.prompt, *completion.ids]])).logits.item()
        for example in EXAMPLES
        for completion in example.completions
    ]
    best = choose_layout(model, multiple_completions=True, measure=score_rewards)
    assert best == ("padded" if name in ("bert", "bart") else "shared")
    for layout in {"padded", best}:
        found = score_rewards(model, lay_out(EXAMPLES, layout)).detach()
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_reward_model_as_a_function(pad_token_id):
    model, tokenizer = make(pad_token_id=pad_token_id), make_tokenizer()
    if pad_token_id is None:
        tokenizer.pad_token = None
    prompts = ["one", "another one", "one", "two"]
    completions = [" is it", " too", " is all", ""]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    ids = [[*encode(p), *encode(c), tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    expected = [model(torch.tensor([row])).logits.item() for row in ids]
    for size in (1, 20, 1000):
        reward = RewardModel(model, tokenizer, tokens_per_batch=size)
        assert reward(prompts, completions, label=[1, 2, 3, 4]) == pytest.approx(expected, abs=1e-6)
    assert reward(
        [encode(p) for p in prompts], [row[len(encode(p)) :] for p, row in zip(prompts, ids, strict=True)]
    ) == (pytest.approx(expected, abs=1e-6))
    assert reward([], []) == []
    with pytest.raises(DataError, match=r"1 completions were given for 2 prompts"):
        reward(["a", "b"], ["c"])


def test_reward_model_of_conversations():
    model, tokenizer = make(), make_tokenizer()
    prompt = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "ho"}]
    ids = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    assert RewardModel(model, tokenizer)([prompt], [answer]) == pytest.approx(
        [model(torch.tensor([ids])).logits.item()]
    )


def test_reward_model_by_name(tmp_path):
    make().save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    reward = RewardModel(str(tmp_path / "judge"))
    assert reward.__name__ == "judge"
    assert reward(["a"], ["b"]) == RewardModel(make(), make_tokenizer())(["a"], ["b"])


# ---- training ----

KINDS = {
    "pairs": (pairs, {}, {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}),
    "scores": (scored, {}, {"absolute_error", "mean_reward", "min_reward", "max_reward"}),
    "steps": (steps, {}, {"accuracy", "mean_reward"}),
    "token ids": (tokenized, {}, {"accuracy", "margin"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_is_learned(tmp_path, kind):
    rows, options, metrics = KINDS[kind]
    trainer = make_trainer(tmp_path, rows(), evaluation=rows(), **options)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss"] < 0.2 * first["loss"]
    assert metrics <= last.keys()
    found = trainer.evaluate()
    assert {f"eval_{name}" for name in metrics} <= found.keys()
    assert found["eval_loss"] <= last["loss"] + 1e-3


def test_the_shared_prompt_is_laid_out_once(tmp_path):
    trainer = make_trainer(tmp_path, pairs(), pad_to_multiple_of=None)
    assert trainer.layout == "shared"
    batch = trainer.collate([Example([5] * 40, (Completion([3]), Completion([4])))])
    assert batch.inputs["input_ids"].numel() == 42


def test_margins_and_centring(tmp_path):
    """Zero rewards: −log σ(−m), and (r_w + r_l)² of a head that is nothing but a constant of one half is 1."""
    model = make()
    torch.nn.init.zeros_(model.score.weight)
    given = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, pairs(margin=[1.0] * 8), model, **given)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log1p(math.e), rel=1e-6)
    trainer = make_trainer(tmp_path, pairs(), make(), center_rewards_coefficient=3.0, **given)
    trainer.train()
    plain = make_trainer(tmp_path, pairs(), make(), **given)
    plain.train()
    rewards = RewardModel(make(), make_tokenizer())
    rows = pairs()
    chosen, rejected = (rewards(rows["prompt"][:], rows[name][:]) for name in ("chosen", "rejected"))
    centring = sum((w + l) ** 2 for w, l in zip(chosen, rejected, strict=True)) / 8  # noqa: E741
    found = trainer.state.log_history[0]["loss"] - plain.state.log_history[0]["loss"]
    assert found == pytest.approx(3.0 * centring, rel=1e-3)


def test_by_name_gets_a_head_with_one_label(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    trainer = RewardTrainer(
        str(tmp_path / "policy"), train_dataset=pairs(), output_dir=str(tmp_path / "out"), max_steps=1, max_length=50
    )
    trainer.train()
    assert trainer.model.config.num_labels == 1


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", None])
def test_adapters_train_the_head_too(tmp_path, task_type):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task_type)
    trainer = make_trainer(tmp_path, pairs(), peft_config=lora)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in before)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.2 * trainer.state.log_history[0]["loss"]
    after = dict(trainer.model.named_parameters())
    assert any("score" in name and not torch.equal(after[name], old) for name, old in before.items())


# ---- the table of mistakes ----


def test_worst_pairs():
    judged = [(torch.tensor([0.5, -2.0]), EXAMPLES[:2]), (torch.tensor([-3.0, -0.1]), EXAMPLES[1:])]
    margins, examples = worst(judged, 2)
    assert margins == [-3.0, -2.0]
    assert examples == [EXAMPLES[1], EXAMPLES[1]]
    assert worst(judged[:1], 5)[0] == [-2.0]


def test_table_of_mistakes(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, pairs(), evaluation=pairs().rename_columns({"chosen": "rejected", "rejected": "chosen"})
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_accuracy"] == 0
    text = capsys.readouterr().out
    assert "Most confident mistakes" in text
    assert "yes" in text


def test_table_is_of_the_rows_of_all_processes(tmp_path, capsys, monkeypatch):
    tokenizer = make_tokenizer()
    elsewhere = Example(
        tokenizer.encode("why"), (Completion(tokenizer.encode("good")), Completion(tokenizer.encode("bad")))
    )
    monkeypatch.setattr("trl.trainers.reward.gather_on_main", lambda own: [own, ([-99.0], [elsewhere])])
    trainer = make_trainer(tmp_path, pairs(), evaluation=pairs(), mistakes_shown=1)
    trainer.evaluate()
    assert "-99.00" in capsys.readouterr().out


def test_table_shows_the_end_of_prompts():
    tokenizer, console = make_tokenizer(), Console(width=200, record=True)
    prompt, chosen, rejected = (tokenizer.encode(text) for text in ("a" * 200 + " why", "good", "bad"))
    print_mistakes([-1.234], [Example(prompt, (Completion(chosen), Completion(rejected)))], tokenizer, console=console)
    text = console.export_text()
    assert all(part in text for part in ("-1.23", "why", "good", "bad", "…aaa"))
    assert len(snippet("a" * 300)) == len(snippet("a" * 300, keep_end=True)) == 120


# ---- bad input ----


def test_two_labels(tmp_path):
    with pytest.raises(
        ModelError, match=r"A reward model has one label, but this LlamaForSequenceClassification has 2"
    ):
        make_trainer(tmp_path, pairs(), make(num_labels=2))
    make(num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"is a classifier with 2 labels: a reward model has one, num_labels=1"):
        make_trainer(tmp_path, pairs(), str(tmp_path / "two"))
    with pytest.raises(ModelError, match=r"A reward model has one label"):
        RewardModel(make(num_labels=2), make_tokenizer())


BAD_ROWS = {
    "score is text": (
        {"text": ["a"], "score": ["high"]},
        r"Row 1, column 'score': expected a number, found str 'high'",
    ),
    "score is missing": (
        {"text": ["a", "b"], "score": [0.5, None]},
        r"Row 2, column 'score': .* found None",
    ),
    "margin is text": (
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "margin": ["1"]},
        r"Row 1, column 'margin': expected a number",
    ),
    "nothing to learn": ({"text": ["a"]}, r"neither pairs \(chosen, rejected\) nor steps .* no column 'score'"),
    "equal": (
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["b"]},
        r"Every row of 'train' has chosen equal to rejected",
    ),
    "steps without labels": (
        {"prompt": ["a"], "completions": [["b", "c"]], "labels": [[True]]},
        r"Row 1, column 'labels': expected 2 labels, one per step",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path, case):
    rows, words = BAD_ROWS[case]
    with pytest.raises(DataError, match=words):
        make_trainer(tmp_path, Dataset.from_dict(rows))


def test_evaluation_of_another_kind(tmp_path):
    with pytest.raises(
        DataError, match=r"'eval' has rows of the kind 'language_modeling', an earlier one of 'preference'"
    ):
        make_trainer(tmp_path, pairs(), evaluation=scored())


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"center_rewards_coefficient=-1.0: give 0 or more"):
        RewardConfig(center_rewards_coefficient=-1.0)
    with pytest.raises(ConfigError, match=r"no option 'beta'"):
        RewardConfig(beta=0.1)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_rows_that_end_with_padding_are_said(tmp_path, caplog, pad):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    make_trainer(tmp_path, pairs(), tokenizer=tokenizer)
    assert ("classifiers of transformers" in caplog.text) == (pad == "</s>")
