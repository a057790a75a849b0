"""ILQLTrainer: its rows, rewards as they are learned from, target heads, guided samples in evaluation, and that it learns."""

from __future__ import annotations

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.conftest import make_tokenizer
from trl.errors import ConfigError, DataError
from trl.models.value_heads.ilql import AutoModelForCausalLMWithILQLHeads, with_ilql_heads
from trl.trainers.ilql import ILQLConfig, ILQLTrainer, RewardScale

WORDS = ["red", "green", "blue", "grey"]
ROWS = Dataset.from_dict({"prompt": ["say "] * 4, "completion": WORDS, "reward": [1.0, 2.0, 3.0, 6.0]})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_trainer(model, tmp_path, rows=ROWS, *, evaluation=None, keywords=None, **options):
    args = ILQLConfig(
        **{
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            **options,
        }
    )
    return ILQLTrainer(model, args, rows, evaluation, make_tokenizer(), **(keywords or {}))


def examples(trainer):
    return trainer.to_examples(list(trainer.train_dataset))


# ---- rows ----


def test_rows_with_a_prompt(make_model, tmp_path):
    first = examples(make_trainer(make_model("gpt2"), tmp_path))[0]
    tokenizer = make_tokenizer()
    assert tokenizer.decode(first.prompt) == "say "
    assert tokenizer.decode(first.completions[0].ids) == "red</s>"
    assert first.completions[0].signals["reward"] == 1.0


def test_dialogues_learn_from_outputs_alone(make_model, tmp_path):
    rows = Dataset.from_dict({"dialogue": [["ab", "cd", "ef", "gh"], ["", "xy"]], "reward": [1.0, -1.0]})
    two, one = examples(make_trainer(make_model("gpt2"), tmp_path, rows))
    tokenizer = make_tokenizer()
    assert tokenizer.decode(two.prompt) == "ab"
    assert tokenizer.decode(two.completions[0].ids) == "cdefgh</s>"
    assert list(two.completions[0].mask) == [True, True, False, False, True, True, True]
    assert tokenizer.decode(one.prompt) == "<s>"
    assert tokenizer.decode(one.completions[0].ids) == "xy</s>"


def test_conversations_learn_from_the_assistant_s_turns(make_model, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = Dataset.from_dict({"messages": [turns, turns], "reward": [0.0, 1.0]})
    (completion,) = examples(make_trainer(make_model("gpt2"), tmp_path, rows))[0].completions
    taken = [token for token, keep in zip(completion.ids, completion.mask, strict=True) if keep]
    assert make_tokenizer().decode(taken) == "b<|im_end|>"


def test_rewards_of_tokens_are_cut_with_them(make_model, tmp_path):
    rows = Dataset.from_dict({"prompt": ["ab"], "completion": ["cdef"], "reward": [[1.0, 2.0, 3.0, 4.0]]})
    first = examples(make_trainer(make_model("gpt2"), tmp_path, rows))[0]
    assert list(first.completions[0].signals["reward"]) == [1.0, 2.0, 3.0, 4.0, 0.0]
    short = examples(make_trainer(make_model("gpt2"), tmp_path, rows, max_length=4))[0]
    assert list(short.completions[0].signals["reward"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": ["a"], "completion": ["b"]}, r"the columns \['prompt', 'completion'\] and no 'reward'"),
        (
            {"dialogue": [["a", "b", "c"]], "reward": [1.0]},
            "Row 1, column 'dialogue': 3 turns: .* their number has to be even",
        ),
        ({"dialogue": [[]], "reward": [1.0]}, "Row 1, column 'dialogue': expected a list of texts"),
        ({"prompt": ["a"], "completion": ["b"], "reward": [float("nan")]}, "Row 1, .*expected a finite number"),
        ({"prompt": ["a"], "completion": ["b"], "reward": [None]}, "Row 1, .*expected a finite number"),
        (
            {"prompt": ["a"], "completion": ["bc"], "reward": [[1.0]]},
            "Row 1, column 'reward': 1 numbers for 3 trained tokens",
        ),
    ],
)
def test_rows_that_cannot_be_learned_from(make_model, tmp_path, columns, words):
    with pytest.raises(DataError, match=words):
        make_trainer(make_model("gpt2"), tmp_path, Dataset.from_dict(columns))


def test_an_encoder_decoder_has_one_prompt(make_model, tmp_path):
    rows = Dataset.from_dict({"dialogue": [["a", "b", "c", "d"]], "reward": [1.0]})
    with pytest.raises(DataError, match="4 turns: an encoder-decoder takes one prompt and one output"):
        make_trainer(make_model("t5"), tmp_path, rows)


def test_a_stream_is_not_normalized(make_model, tmp_path):
    with pytest.raises(ConfigError, match="normalize_rewards=True needs all rewards before training"):
        make_trainer(make_model("gpt2"), tmp_path, ROWS.to_iterable_dataset())
    make_trainer(make_model("gpt2"), tmp_path, ROWS.to_iterable_dataset(), normalize_rewards=False).train()


# ---- rewards ----


def test_rewards_are_standardised_over_the_rows():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3."""
    scale = RewardScale.of(ROWS, "train")
    assert scale.mean == pytest.approx(3.0)
    assert scale.std == pytest.approx((14 / 3) ** 0.5)
    assert scale(torch.tensor([3.0, 6.0])).tolist() == pytest.approx([0.0, 3 / (14 / 3) ** 0.5])


def test_rewards_of_tokens_are_scaled_and_not_shifted():
    scale = RewardScale.of(Dataset.from_dict({"reward": [[1.0, 1.0], [4.0]]}), "train")
    assert scale.std == pytest.approx(2.0**0.5)
    assert scale(torch.tensor([[2.0, 0.0]])).tolist() == [pytest.approx([2.0**0.5, 0.0])]


def test_equal_rewards_are_shifted_alone():
    assert RewardScale.of(Dataset.from_dict({"reward": [2.0, 2.0]}), "train") == RewardScale(2.0, 1.0)


# ---- heads ----


class Targets(TrainerCallback):
    """The first weight of the target heads after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen.append(model.v_head.target_qs[0].actions.bias.sum().item())


def test_targets_move_every_so_many_steps(make_model, tmp_path):
    trainer = make_trainer(make_model("gpt2"), tmp_path, max_steps=6, steps_for_target_q_sync=3, alpha=0.5)
    start = trainer.model.v_head.target_qs[0].actions.bias.sum().item()
    trainer.add_callback(watch := Targets())
    trainer.train()
    assert watch.seen[0] == watch.seen[1] == start
    assert watch.seen[2] == watch.seen[3] == watch.seen[4] != start
    assert watch.seen[5] != watch.seen[4]


def test_with_alpha_1_targets_are_copies(make_model, tmp_path):
    trainer = make_trainer(make_model("gpt2"), tmp_path, steps_for_target_q_sync=1, alpha=1.0)
    trainer.train()
    heads = trainer.model.v_head
    for target, q in zip(heads.target_qs.parameters(), heads.qs.parameters(), strict=True):
        assert torch.equal(target, q)


def test_two_qs_and_the_model_agree(make_model, tmp_path):
    with pytest.raises(ConfigError, match="two_qs=True, but the model has 1 Q heads: set two_qs=False"):
        make_trainer(with_ilql_heads(make_model("gpt2"), two_qs=False), tmp_path)
    trainer = make_trainer(with_ilql_heads(make_model("gpt2"), two_qs=False), tmp_path, two_qs=False)
    trainer.train()


def test_saved_with_its_heads(make_model, tmp_path):
    trainer = make_trainer(make_model("gpt2"), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLMWithILQLHeads.from_pretrained(tmp_path / "saved")
    for name, tensor in trainer.model.v_head.state_dict().items():
        assert torch.equal(loaded.v_head.state_dict()[name], tensor.cpu())
    again = make_trainer(str(tmp_path / "saved"), tmp_path)
    targets = (each.v_head.target_qs[0].actions.weight.cpu() for each in (again.model, loaded))
    assert torch.equal(*targets)


# ---- learning ----


def lower(completions, **_):
    return [float("b" in text) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_better_half_is_preferred_by_q_values_and_not_by_imitation(make_model, tmp_path, name):
    """After "say " half of the rows go on with b, rewarded, half with r: imitation says either, guidance says b."""
    rows = Dataset.from_dict(
        {"prompt": ["say "] * 8, "completion": ["b", "r"] * 4, "reward": [1.0, 0.0] * 4},
    )
    trainer = make_trainer(
        make_model(name),
        tmp_path,
        rows,
        evaluation=rows,
        keywords={"reward_funcs": lower, "eval_prompts": rows.select_columns("prompt")},
        per_device_train_batch_size=8,
        max_steps=100,
        learning_rate=3e-3,
        alpha=0.1,
        eval_betas=[0.0, 30.0],
        max_completion_length=1,
        num_generations_eval=20,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert 0.25 < metrics["eval_reward@beta=0"] < 0.75
    assert metrics["eval_reward@beta=30"] > 0.9
    assert metrics["eval_loss/q"] < 1.0


def test_samples_of_an_evaluation_need_prompts_and_rewards(make_model, tmp_path):
    with pytest.raises(ConfigError, match="give eval_prompts, rows with a column 'prompt'"):
        make_trainer(make_model("gpt2"), tmp_path, keywords={"reward_funcs": lower})
    with pytest.raises(ConfigError, match="eval_prompts have no effect without reward_funcs"):
        make_trainer(make_model("gpt2"), tmp_path, keywords={"eval_prompts": ROWS})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 2.0}, "tau=2.0"),
        ({"eval_betas": [-1.0]}, "beta=-1.0: give 0 or more"),
        ({"top_k": -1}, "top_k=-1"),
        ({"taus": 0.5}, "no option 'taus'. Did you mean 'tau'"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        ILQLConfig(output_dir=str(tmp_path), **options)
