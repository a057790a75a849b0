"""DPOTrainer: the reference is the model as given, precomputed numbers are the same numbers, and bad input is told."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

from tests.conftest import make_tokenizer
from trl.errors import ConfigError, DataError
from trl.models.reference import (
    AdapterOff,
    FrozenModel,
    NamedAdapter,
    Precomputed,
    SharedTrunk,
    SnapshotReference,
    create_reference_model,
)
from trl.trainers.cpo import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
from trl.trainers.dpo import DPOConfig, DPOTrainer
from trl.trainers.reference import mix

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def pairs(n: int = 8) -> Dataset:
    words = ["red", "green", "blue", "cyan", "pink", "grey", "teal", "gold"]
    return Dataset.from_dict(
        {
            "prompt": [f"colour {words[i % 8]} " + "please " * (i % 3) for i in range(n)],
            "chosen": [f"{words[i % 8]} it is" for i in range(n)],
            "rejected": [f"no {i} " * (1 + i % 4) for i in range(n)],
        }
    )


def chats() -> Dataset:
    row = lambda i, text: [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": text}]  # noqa: E731
    return Dataset.from_dict(
        {"chosen": [row(i, f"yes {i}") for i in range(4)], "rejected": [row(i, "no") for i in range(4)]}
    )


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def options(tmp_path, **changed):
    return {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        **changed,
    }


def make_trainer(model, tmp_path, rows=None, *, kind=DPOTrainer, peft_config=None, ref_model=None, **changed):
    args = kind.config_class(**options(tmp_path, **changed))
    arguments = {"ref_model": ref_model, "peft_config": peft_config, "tokenizer": make_tokenizer()}
    return kind(model, args=args, train_dataset=pairs() if rows is None else rows, **arguments)


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(model, **changes):
    return get_peft_model(model, LoraConfig(**{**LORA.to_dict(), **changes}))


def two_adapters(model):
    model = adapted(model)
    model.add_adapter("ref", LORA)
    return model


def saved_then_changed(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "saved")
    return disturb(type(model).from_pretrained(tmp_path / "saved"))


GIVEN = {
    "never saved": (lambda make, path: make("llama"), {}, FrozenModel),
    "changed in memory": (saved_then_changed, {}, FrozenModel),
    "encoder-decoder": (lambda make, path: make("bart"), {}, FrozenModel),
    "no tree attention": (lambda make, path: make("mamba"), {}, FrozenModel),
    "new adapter": (lambda make, path: disturb(make("llama")), {"peft_config": LORA}, AdapterOff),
    "untrained adapter": (lambda make, path: adapted(make("llama")), {}, SnapshotReference),
    "trained adapter": (lambda make, path: disturb(adapted(make("llama"))), {}, SnapshotReference),
    "adapter with dropout": (lambda make, path: adapted(make("llama"), lora_dropout=0.5), {}, SnapshotReference),
    "two adapters": (lambda make, path: two_adapters(make("llama")), {"ref_adapter_name": "ref"}, NamedAdapter),
    "precomputed": (lambda make, path: disturb(make("llama")), {"precompute_ref_log_probs": True}, Precomputed),
    "precomputed, adapter": (
        lambda make, path: disturb(adapted(make("llama"))),
        {"precompute_ref_log_probs": True},
        Precomputed,
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_first_loss_is_ln_2_and_then_falls(make_model, tmp_path, case):
    make, given, kind = GIVEN[case]
    trainer = make_trainer(make(make_model, tmp_path), tmp_path, **given)
    assert isinstance(trainer.reference, kind)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-4), "the policy did not move away from the reference"
    known = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    assert known | {"logps/chosen", "logps/rejected", "entropy"} <= second.keys()


HALF = {"bf16": True, "use_cpu": not torch.cuda.is_available()}


@pytest.mark.parametrize("case", ["never saved", "precomputed", "precomputed, adapter"])
def test_the_first_loss_in_half_precision(make_model, tmp_path, case):
    """Off by 5e-4 without autocast on one side; by some 1e-6 where rounding depends on the shape of a batch."""
    make, given, _ = GIVEN[case]
    trainer = make_trainer(make(make_model, tmp_path), tmp_path, max_steps=1, **given, **HALF)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=5e-5)


@pytest.mark.parametrize("precision", [{}, HALF])
def test_shared_layers(make_model, tmp_path, precision):
    model = make_model("gpt2")
    reference = create_reference_model(model, num_shared_layers=1)
    trainer = make_trainer(model, tmp_path, ref_model=reference, **precision)
    assert isinstance(trainer.reference, SharedTrunk)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[1]["loss"] < math.log(2)
    lower = model.transformer.h[0].mlp.c_fc.weight
    assert lower.data_ptr() == reference.transformer.h[0].mlp.c_fc.weight.data_ptr()


def test_the_simplest_call(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(make_model("llama"), tokenizer=make_tokenizer(), train_dataset=pairs(), max_steps=1, beta=0.5)
    trainer.train()
    assert trainer.args.beta == trainer.algorithm.beta == 0.5


@pytest.mark.parametrize("rows", [pairs, chats])
def test_loss_against_plain_forwards(make_model, tmp_path, rows):
    """−log σ(β [h_w − h_l]) from the logits of every sequence alone."""
    model, reference = make_model("llama"), make_model("llama", seed=1)
    trainer = make_trainer(model, tmp_path, rows(), ref_model=reference, max_steps=1, per_device_train_batch_size=8)
    encoded = [dict(row) for row in trainer.train_dataset]
    losses = []
    for row in encoded:
        h = []
        for ids in row["completion_ids"]:
            whole = torch.tensor([row["prompt_ids"] + ids], device=model.device)
            picked = [
                m(whole).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)[range(len(ids)), ids].sum()
                for m in (model, reference)
            ]
            h.append((picked[0] - picked[1]).item())
        losses.append(math.log1p(math.exp(-0.1 * (h[0] - h[1]))))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


# ---- precomputed ----


def test_precomputed_numbers_come_from_disk_the_second_time(make_model, tmp_path, cache_folder):
    given = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    first = make_trainer(make_model("llama"), tmp_path, **given)
    (folder,) = (cache_folder / "trl_reference").iterdir()
    written = folder.stat().st_mtime_ns
    again = make_trainer(make_model("llama"), tmp_path, **given)
    assert [f.stat().st_mtime_ns for f in (cache_folder / "trl_reference").iterdir()] == [written]
    assert again.train_dataset["ref_logprobs"][:] == first.train_dataset["ref_logprobs"][:]
    for changed in (make_model("llama", seed=1), disturb(make_model("llama"))):
        make_trainer(changed, tmp_path, **given)
    make_trainer(make_model("llama"), tmp_path, rows=pairs(7), **given)
    assert len(list((cache_folder / "trl_reference").iterdir())) == 4


def test_precomputing_with_a_new_adapter_does_not_depend_on_its_random_start(make_model, tmp_path, cache_folder):
    for seed in (0, 1):
        model = make_model("llama")
        torch.manual_seed(seed)
        make_trainer(model, tmp_path, peft_config=LORA, precompute_ref_log_probs=True)
    assert len(list((cache_folder / "trl_reference").iterdir())) == 1


def test_precomputed_training_is_the_same_training(make_model, tmp_path):
    found = []
    for precompute in (False, True):
        trainer = make_trainer(make_model("llama"), tmp_path, precompute_ref_log_probs=precompute)
        trainer.train()
        found.append(trainer.state.log_history[1]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_precomputed_evaluation_sets(make_model, tmp_path):
    args = DPOConfig(**options(tmp_path, precompute_ref_log_probs=True))
    sets = {"a": pairs(4), "b": pairs(2)}
    trainer = DPOTrainer(make_model("llama"), args=args, eval_dataset=sets, tokenizer=make_tokenizer())
    found = trainer.evaluate()
    assert found["eval_a_loss"] == found["eval_b_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["eval_a_rewards/accuracies"] <= 1


def test_a_stream_cannot_be_precomputed(make_model, tmp_path):
    with pytest.raises(
        ConfigError, match=r"precompute_ref_log_probs reads 'train' before training, but it is a stream"
    ):
        make_trainer(make_model("llama"), tmp_path, pairs().to_iterable_dataset(), precompute_ref_log_probs=True)


# ---- TR-DPO ----


def test_mix():
    reference, policy = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(reference.weight, 1.0)
    torch.nn.init.constant_(policy.weight, 3.0)
    mix(reference, policy, 0.25)
    assert reference.weight.item() == 1.5


def test_synced_reference_follows_and_is_part_of_a_checkpoint(make_model, tmp_path):
    given = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "save_strategy": "steps"}
    trainer = make_trainer(make_model("llama"), tmp_path, max_steps=3, save_steps=2, **given)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-4)
    assert losses[2] == pytest.approx(math.log(2), abs=1e-6), "after step 2 the reference is the policy"
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert "lm_head.weight" in torch.load(checkpoint / "trl_state.pt", weights_only=True)["reference"]
    resumed = make_trainer(make_model("llama"), tmp_path, max_steps=3, save_steps=2, **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.log_history[-2]["loss"] == losses[2]


# ---- the family ----


@pytest.mark.parametrize("loss_type", ["simpo", "orpo", "cpo", "alphapo", "sft"])
def test_losses_without_a_reference_hold_none(make_model, tmp_path, loss_type):
    trainer = make_trainer(make_model("llama"), tmp_path, loss_type=loss_type)
    assert trainer.reference is None
    trainer.train()
    assert trainer.state.log_history[1]["loss"] < trainer.state.log_history[0]["loss"]


def test_weighted_sum(make_model, tmp_path):
    trainer = make_trainer(
        make_model("llama"),
        tmp_path,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        max_steps=1,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/sigmoid"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["loss/bco_pair"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert log["loss"] == pytest.approx(1.2 * math.log(2) + log["loss/sft"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [(CPOTrainer, {}), (CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0}), (ORPOTrainer, {})],
)
def test_named_fronts(make_model, tmp_path, kind, changed):
    trainer = make_trainer(make_model("llama"), tmp_path, kind=kind, **changed)
    trainer.train()
    assert trainer.reference is None
    assert trainer.state.log_history[1]["loss"] < trainer.state.log_history[0]["loss"]


def test_fronts_are_dpo_losses():
    assert CPOConfig(loss_type="simpo", cpo_alpha=0.0).make_algorithm().terms == [("simpo", 1.0)]
    assert CPOConfig(cpo_alpha=0.3).make_algorithm().terms == [("sigmoid", 1.0), ("sft", 0.3)]
    assert not CPOConfig().make_algorithm().needs_reference
    assert CPOConfig(ld_alpha=0.5, loss_type="alphapo", alpha=0.1).make_algorithm().alphapo_alpha == 0.1
    assert CPOConfig(loss_type="alphapo").make_algorithm().terms == [("alphapo", 1.0)]
    assert CPOConfig(loss_type="alphapo", cpo_alpha=0.2).make_algorithm().terms == [("alphapo", 1.0), ("sft", 0.2)]
    assert CPOConfig(loss_type="simpo", alpha=0.1).make_algorithm().terms == [("alphapo", 1.0), ("sft", 1.0)]
    with pytest.raises(ConfigError, match=r"Unknown reference_free 'False'\. Known: True"):
        CPOConfig(reference_free=False)
    with pytest.raises(ConfigError, match=r"Unknown loss_type 'sigmoid'\. Known: orpo"):
        ORPOConfig(loss_type="sigmoid")
    with pytest.raises(ConfigError, match="rpo_alpha=1.0 is called cpo_alpha here"):
        CPOConfig(rpo_alpha=1.0)
    with pytest.raises(ConfigError, match=r"Unknown loss_type 'orpo'\. Known: sigmoid, hinge, ipo, simpo, alphapo"):
        CPOConfig(loss_type="orpo")
    assert ORPOConfig(beta=0.2).make_algorithm().terms == [("orpo", 1.0)]


def test_wpo_weighs_pairs(make_model, tmp_path):
    trainer = make_trainer(make_model("llama"), tmp_path, use_weighting=True, max_steps=1)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


# ---- bad input ----


def test_chosen_equal_to_rejected_is_dropped_and_counted(make_model, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["x", "z"]})
    trainer = make_trainer(make_model("llama"), tmp_path, rows)
    assert len(trainer.train_dataset) == 1
    assert "1 dropped (chosen equals rejected)" in str(trainer.encoded["train"].report)
    same = Dataset.from_dict({"prompt": ["a"], "chosen": ["x"], "rejected": ["x"]})
    with pytest.raises(DataError, match=r"Every row of 'train' has chosen equal to rejected: nothing can be learned"):
        make_trainer(make_model("llama"), tmp_path, same)


def test_completions_emptied_by_truncation_are_dropped_and_counted(make_model, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a" * 30, "b"], "chosen": ["x", "y"], "rejected": ["w", "z"]})
    trainer = make_trainer(make_model("llama"), tmp_path, rows, max_length=20)
    assert "1 dropped (no token left to train on)" in str(trainer.encoded["train"].report)
    kept = make_trainer(make_model("llama"), tmp_path, rows, max_length=20, truncation_mode="keep_end")
    assert len(kept.train_dataset) == 2
    short = make_trainer(make_model("llama"), tmp_path, rows, max_length=20, max_prompt_length=10)
    assert len(short.train_dataset) == 2
    with pytest.raises(DataError, match=r"max_length=1, .*Raise max_length"):
        make_trainer(make_model("llama"), tmp_path, rows, max_length=1)


def test_missing_prompt(make_model, tmp_path):
    rows = Dataset.from_dict({"chosen": ["so be it", "yes"], "rejected": ["so not", "no"]})
    with pytest.raises(DataError, match="Row 2 has no prompt"):
        make_trainer(make_model("llama"), tmp_path, rows)
    with pytest.raises(DataError, match=r"columns \['chosen', 'prompt'\] do not fit any row kind"):
        make_trainer(make_model("llama"), tmp_path, Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}))


WRONG = {
    "unknown loss": ({"loss_type": "sigmod"}, r"Unknown loss_type 'sigmod'. Did you mean 'sigmoid'"),
    "coupled pairs, split": (
        {"loss_type": "aot", "gradient_accumulation_steps": 2},
        r"loss_type=\['aot'\] sorts the pairs of a batch, so a step cannot be split",
    ),
    "moved and kept": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, r"choose one"),
    "padded and padding-free": (
        {"layout": "padded", "padding_free": True},
        r"padding_free=True contradicts layout='padded'",
    ),
    "adapter names": ({"ref_adapter_name": "ref"}, r"this one has none: give a PeftModel with both loaded"),
    "reference of nothing": (
        {"loss_type": "simpo", "ref_model": "x"},
        r"ref_model was given, but loss_type='simpo' uses no reference",
    ),
    "precomputed reference of nothing": (
        {"loss_type": "orpo", "precompute_ref_log_probs": True},
        r"loss_type='orpo' uses no reference: leave out sync_ref_model and precompute_ref_log_probs",
    ),
    "moving an adapter's reference": ({"sync_ref_model": True, "peft_config": LORA}, r"train without an adapter"),
    "old name": ({"max_completion_length": 5}, r"DPOConfig has no option 'max_completion_length'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(make_model, tmp_path, case):
    changed, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        make_trainer(make_model("llama"), tmp_path, **changed)


def test_wrong_references(make_model, tmp_path):
    model = make_model("llama")
    with pytest.raises(ConfigError, match=r"model and ref_model are the same object"):
        make_trainer(model, tmp_path, ref_model=model)
    with pytest.raises(ConfigError, match=r"Unknown adapter 'reff'. Did you mean 'ref'\?"):
        make_trainer(two_adapters(make_model("llama")), tmp_path, ref_adapter_name="reff")
    with pytest.raises(ConfigError, match=r"ref_adapter_name='default' is the adapter that is trained"):
        make_trainer(two_adapters(make_model("llama")), tmp_path, ref_adapter_name="default")


@pytest.mark.parametrize("words", [[], ["--loss_type", "ipo"]])
def test_a_parser_of_transformers_makes_the_configuration(tmp_path, words):
    fixed = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu"]
    (made,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses([*fixed, *words])
    assert made.make_algorithm().terms == [(words[1] if words else "sigmoid", 1.0)]
