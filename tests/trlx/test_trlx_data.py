"""Dialogues and prompts as token ids, and what functions of scripts are given."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch

from tests.conftest import make_tokenizer
from trl.errors import ConfigError, DataError
from trl.rollouts.evaluation import swept
from trlx.data.configs import OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.pipeline.offline_pipeline import DialogMessage, PromptPipeline, dialogue_row, tokenize_dialogue
from trlx.trainer.accelerate_ilql_trainer import make_experience
from trlx.trainer.options import (
    adapter_config,
    batches_of,
    make_scheduler,
    optimizer_class,
    sampling_params,
    steps_of_epochs,
)
from trlx.trainer.scoring import ScriptReward, Texts, cut_at, fitted, script_metrics


def tokenizer_cutting(side):
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    return tokenizer


def ids(text):
    return tuple(make_tokenizer()(text, add_special_tokens=False).input_ids)


BOS, EOS = 1, 2


def test_a_text_is_an_output_after_the_first_token():
    assert tokenize_dialogue("ab", make_tokenizer()) == [
        DialogMessage(False, (BOS,)),
        DialogMessage(True, (*ids("ab"), EOS)),
    ]


def test_outputs_are_every_second_turn():
    found = tokenize_dialogue(["ab", "c", "d", "ef</s>"], make_tokenizer())
    assert [m.is_output for m in found] == [False, True, False, True]
    assert found[-1].tokens == (*ids("ef"), EOS)


def test_what_is_too_long_is_cut_at_its_end():
    found = tokenize_dialogue(["ab", "cd", "ef", "gh"], tokenizer_cutting("right"), 5)
    assert found == [DialogMessage(False, ids("ab")), DialogMessage(True, ids("cd")), DialogMessage(False, ids("e"))]


def test_what_is_too_long_is_cut_at_its_beginning():
    """Of seven tokens the first is that of a beginning, where an output would be it."""
    end = [DialogMessage(False, ids("ef")), DialogMessage(True, (*ids("gh"), EOS))]
    dialogue = ["ab", "cd", "ef", "gh"]
    assert tokenize_dialogue(dialogue, tokenizer_cutting("left"), 6) == end
    seven = tokenize_dialogue(dialogue, tokenizer_cutting("left"), 7)
    assert seven == [DialogMessage(False, (BOS,)), DialogMessage(True, ids("d")), *end]


def test_an_output_alone_has_a_beginning_before_it():
    found = tokenize_dialogue(["ab", "cdef"], tokenizer_cutting("left"), 4)
    assert found == [DialogMessage(False, (BOS,)), DialogMessage(True, (*ids("ef"), EOS))]


@pytest.mark.parametrize(
    ("dialogue", "words"),
    [
        (["a", "b", "c"], "their number must be even: found 3"),
        ([], "their number must be even: found 0"),
        (["a", 1], "a list in which prompts and outputs alternate; found"),
        (3, "a list in which prompts and outputs alternate; found 3"),
    ],
)
def test_dialogues_that_are_none(dialogue, words):
    with pytest.raises(DataError, match=words):
        tokenize_dialogue(dialogue, make_tokenizer())


def test_rows_of_dialogues():
    messages = tokenize_dialogue(["ab", "c"], make_tokenizer())
    assert dialogue_row(messages) == {"input_ids": [*ids("abc"), EOS], "completion_mask": [0, 0, 1, 1]}
    assert dialogue_row(messages, encoder_decoder=True) == {"input_ids": [*ids("ab")], "labels": [*ids("c"), EOS]}
    with pytest.raises(DataError, match="one prompt and one output per sample: found 4 turns"):
        dialogue_row(tokenize_dialogue(["a", "b", "c", "d"], make_tokenizer()), encoder_decoder=True)


def test_experience_is_samples_with_their_rewards():
    rows = make_experience(["ab", ["a", "b"]], [1, torch.tensor(0.5)], make_tokenizer())
    assert rows["reward"] == [1.0, 0.5]
    per_token = make_experience([["a", "bc"]], [[0.5, 1.0]], make_tokenizer())
    assert per_token["reward"] == [[0.5, 1.0]]
    with pytest.raises(DataError, match="2 samples and 1 rewards were given"):
        make_experience(["a", "b"], [1.0], make_tokenizer())
    with pytest.raises(DataError, match=r"samples\[1\]: In a dialogue, prompts and outputs alternate"):
        make_experience(["a", ["b"]], [1.0, 2.0], make_tokenizer())


def test_prompts_are_rows():
    pipeline = PromptPipeline([{"prompt": "abc", "label": 1}, {"prompt": "d", "label": 2}], 2, make_tokenizer())
    assert pipeline[0] == {"prompt": "abc", "label": 1, "input_ids": [*ids("ab")], "attention_mask": [1, 1]}
    (batch,) = pipeline.create_loader(2)
    assert batch["input_ids"].shape == (2, 2)
    assert batch["label"] == [1, 2]
    assert PromptPipeline(["abc"], 2, tokenizer_cutting("left"))[0]["input_ids"] == [*ids("bc")]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([1], r"prompts\[0\] is 1: give a text, or a dict"),
        (["a", {"text": "b"}], r"prompts\[1\] is \{'text': 'b'\}"),
        (
            ["a", {"prompt": "b", "label": 1}],
            r"prompts\[1\] has the keys \['label', 'prompt'\], the first one \['prompt'\]",
        ),
    ],
)
def test_prompts_that_are_none(prompts, words):
    with pytest.raises(DataError, match=words):
        PromptPipeline(prompts, 4, make_tokenizer())


# ---- functions of scripts ----


def test_outputs_end_before_stop_sequences():
    assert cut_at("one two \n Human: three", ["Human:", "two"]) == "one"
    assert cut_at("one two ", ["Human:"]) == "one two "


def given(separator="", **options):
    seen = []

    def reward_fn(samples, prompts, outputs, tokenizer, label, **_):
        seen.append({"samples": samples, "prompts": prompts, "outputs": outputs, "label": label})
        return [float(len(output)) for output in outputs]

    reward = ScriptReward(reward_fn, Texts(make_tokenizer(), ["x"], separator), **options)
    completion_ids = [list(ids("cdxe")), [*ids("f"), EOS], list(ids("ghi"))]
    found = reward(
        prompts=["a", "b", "c"], completions=[""] * 3, completion_ids=completion_ids, label=[1, 2, 3], trainer_state=1
    )
    return found, seen


def test_a_reward_function_is_given_texts_and_columns():
    found, (call,) = given()
    assert found == [2.0, 1.0, 3.0]
    assert call == {
        "samples": ["acd", "bf", "cghi"],
        "prompts": ["a", "b", "c"],
        "outputs": ["cd", "f", "ghi"],
        "label": [1, 2, 3],
    }
    assert given(separator="<sep>")[1][0]["samples"][0] == "a<sep>cd"


def test_it_is_called_for_so_many_samples_at_a_time():
    found, calls = given(chunk_size=2)
    assert found == [2.0, 1.0, 3.0]
    assert [call["label"] for call in calls] == [[1, 2], [3]]


def test_scores_are_clipped():
    assert given(clip=1.5)[0] == [1.5, 1.0, 1.5]


def test_rollouts_are_written(tmp_path):
    given(folder=tmp_path)
    (file,) = tmp_path.glob("*/epoch_0.json")
    assert json.loads(file.read_text())[0] == {"prompt": "a", "response": "cd", "score": 2.0}


def test_rewards_of_tokens_are_kept_beside_their_sums():
    rewards = [[1.0, 2.0, 3.0], torch.tensor([5.0])]
    reward = ScriptReward(lambda samples: rewards, Texts(make_tokenizer()), clip=2.5)
    found = reward(prompts=["a", "b"], completions=["", ""], completion_ids=[list(ids("cd")), list(ids("efg"))])
    assert reward.dense == [[1.0, 4.5], [2.5, 0.0, 0.0]]
    assert found == [5.5, 2.5]


def test_rewards_of_more_or_fewer_tokens_keep_their_sum():
    assert fitted([1.0, 2.0], 4) == [1.0, 2.0, 0.0, 0.0]
    assert fitted([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 9.0]
    assert fitted([1.0], 1) == [1.0]


def test_numbers_and_lists_do_not_mix():
    reward = ScriptReward(lambda samples: [[1.0], 2.0], Texts(make_tokenizer()))
    with pytest.raises(DataError, match="a list for the first sample and 2.0 for sample 2"):
        reward(prompts=["a", "b"], completions=["", ""], completion_ids=[[5], [6]])


def test_metrics_are_named():
    measure = script_metrics(lambda samples, outputs: {"length": [len(o) for o in outputs]}, Texts(make_tokenizer()))
    assert measure(prompts=["a"], completions=[""], completion_ids=[list(ids("bcd"))]) == {"metrics/length": [3]}


# ---- options ----


def test_options_that_are_lists_are_swept():
    assert swept({"beta": [0, 1], "top_k": 5, "eos_token_id": [1, 2]}) == {
        "@beta=0": {"beta": 0, "top_k": 5, "eos_token_id": [1, 2]},
        "@beta=1": {"beta": 1, "top_k": 5, "eos_token_id": [1, 2]},
    }
    assert list(swept({"beta": [0, 1], "temperature": [0.5, 1.0]})) == [
        "@beta=0@temperature=0.5",
        "@beta=0@temperature=1.0",
        "@beta=1@temperature=0.5",
        "@beta=1@temperature=1.0",
    ]
    assert swept({"top_k": 5}) == {"": {"top_k": 5}}


def test_sampling():
    params = sampling_params(
        {"max_new_tokens": 7, "top_k": 0.0, "top_p": 0.9, "do_sample": True, "beta": 2}, stop=["x"]
    )
    assert (params.max_new_tokens, params.top_k, params.top_p, params.beta, params.stop) == (7, 0, 0.9, 2, ("x",))
    assert params.generation_config is None
    assert sampling_params({"max_new_tokens": 7, "do_sample": False}, stop=[]).greedy
    ended = sampling_params({"max_new_tokens": 7, "eos_token_id": 9, "pad_token_id": 9}, stop=[])
    assert (ended.stop_token_ids, ended.ignore_eos) == ((9,), True)
    assert sampling_params({"max_new_tokens": 7, "no_repeat_ngram_size": 2}, stop=[]).generation_config is not None
    with pytest.raises(ConfigError, match="gen_kwargs has no option 'max_new_token'. Did you mean 'max_new_tokens'"):
        sampling_params({"max_new_token": 7}, stop=[])


def test_optimizers():
    cls, kwargs = optimizer_class(OptimizerConfig("adamw", {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}))
    assert cls is torch.optim.AdamW
    assert kwargs == {"lr": 1e-4, "betas": (0.9, 0.95)}
    if find_spec("bitsandbytes"):
        assert optimizer_class(OptimizerConfig("adamw_8bit_bnb", {"lr": 1e-4}))[0].__name__ == "AdamW8bit"
    with pytest.raises(ConfigError, match="Unknown optimizer.name 'adamm'. Did you mean 'adam'"):
        optimizer_class(OptimizerConfig("adamm", {"lr": 1}))
    with pytest.raises(ConfigError, match=r"optimizer.kwargs.lr is missing"):
        optimizer_class(OptimizerConfig("adam"))
    with pytest.raises(ConfigError, match=r"optimizer.kwargs.lr='1e-4' is text: give a number"):
        optimizer_class(OptimizerConfig("adam", {"lr": "1e-4"}))


def test_schedulers():
    """Half way through T_max the rate is half way between its start and eta_min."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(SchedulerConfig("cosine_annealing", {"T_max": 2, "eta_min": 0.5}), optimizer)
    optimizer.step()
    scheduler.step()
    assert math.isclose(scheduler.get_last_lr()[0], 0.75)
    with pytest.raises(ConfigError, match="Unknown scheduler.name 'cosine'. Known: cosine_annealing, linear"):
        make_scheduler(SchedulerConfig("cosine", {}), optimizer)
    with pytest.raises(ConfigError, match="scheduler.kwargs=.* of linear"):
        make_scheduler(SchedulerConfig("linear", {"T_max": 2}), optimizer)


def test_processes_share_an_epoch(monkeypatch):
    """100 samples in batches of 10: ten steps an epoch alone, five on two processes."""
    section = TrainConfig(100, 8, 2, 10, 1, 1)
    assert steps_of_epochs(section, batches_of(100, section)) == 20
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps_of_epochs(section, batches_of(100, section)) == 10


def test_adapters():
    assert adapter_config(None) is None
    lora = adapter_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4})
    assert lora.r == 4
    assert adapter_config(lora) is lora
    with pytest.raises(ConfigError, match="give a configuration of peft, or a dict of one with its peft_type"):
        adapter_config({"r": 4})
    with pytest.raises(ConfigError, match="is no configuration of peft"):
        adapter_config({"peft_type": "LORA", "rank": 4})
