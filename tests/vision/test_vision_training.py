"""Every trainer on rows with images: the same numbers in every layout, which depend on the images."""

from __future__ import annotations

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Gemma3ForSequenceClassification

from tests.vision.support import FAMILIES, Tiny, gemma3, llava, picture, qwen2_5_vl, seeded
from trl.errors import ConfigError
from trl.rewards.model import RewardModel
from trl.trainers.cpo import CPOConfig, CPOTrainer
from trl.trainers.dpo import DPOConfig, DPOTrainer
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.kto import KTOConfig, KTOTrainer
from trl.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.reward import RewardConfig, RewardTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer

LAYOUTS = ("padded", "packed", "shared")
QUESTIONS = ["what is this?", "see", "describe it", "how many boxes?"]
MODELS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}
COLLATED = ("llava", "qwen2_5_vl", "gemma3", "idefics3")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows(kind: str, seed: int = 0) -> Dataset:
    """Rows with one, two and no images."""
    images = [[picture(seed + 1)], [picture(seed + 2, 24, 40), picture(seed + 3)], [], [picture(seed + 4, 20, 20)]]
    answers = [said("assistant", f"a box {i}") for i in range(4)]
    by_kind = {
        "chat": {"messages": [said("user", q) + a for q, a in zip(QUESTIONS, answers, strict=True)]},
        "completion": {"prompt": [said("user", q) for q in QUESTIONS], "completion": answers},
        "pairs": {
            "prompt": [said("user", q) for q in QUESTIONS],
            "chosen": answers,
            "rejected": [said("assistant", f"no {i} such thing") for i in range(4)],
        },
        "labelled": {
            "prompt": [said("user", q) for q in QUESTIONS],
            "completion": answers,
            "label": [True, False, True, False],
        },
        "prompts": {"prompt": [said("user", q) for q in QUESTIONS]},
    }
    data = Dataset.from_dict({**by_kind[kind], "images": images})
    return data.cast_column("images", datasets.List(datasets.Image()))


TRAINERS = {
    "sft chat": (SFTConfig, SFTTrainer, "chat", {}),
    "sft": (SFTConfig, SFTTrainer, "completion", {}),
    "dpo": (DPOConfig, DPOTrainer, "pairs", {}),
    "dpo precomputed": (DPOConfig, DPOTrainer, "pairs", {"precompute_ref_log_probs": True}),
    "cpo": (CPOConfig, CPOTrainer, "pairs", {}),
    "kto": (KTOConfig, KTOTrainer, "labelled", {}),
    "grpo": (GRPOConfig, GRPOTrainer, "prompts", {"beta": 0.1, "num_generations": 2}),
    "rloo": (RLOOConfig, RLOOTrainer, "prompts", {"num_generations": 2}),
    "online dpo": (OnlineDPOConfig, OnlineDPOTrainer, "prompts", {}),
    "ppo": (PPOConfig, PPOTrainer, "prompts", {"ppo_epochs": 1, "batch_size": 4, "mini_batch_size": 4}),
}


def count_of(completion_ids, images, **_):
    """A number that depends on the samples; every row's images arrive as PIL images."""
    assert all(hasattr(image, "size") for own in images for image in own)
    assert {len(own) for own in images} <= {0, 1, 2}
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(name: str, tmp_path, tiny, data: Dataset, *, peft_config=None, **options):
    config_class, trainer_class, kind, own = TRAINERS[name]
    common = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        **({"max_completion_length": 4} if kind == "prompts" else {}),
        **own,
        **options,
    }
    keywords = {"reward_funcs": count_of} if kind == "prompts" else {}
    return trainer_class(
        model=tiny.model, args=config_class(**common), train_dataset=data, processing_class=tiny.processor,
        peft_config=peft_config, **keywords,
    )  # fmt: skip


def history(trainer) -> list[float]:
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "grad_norm") if name in entry]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_in_every_layout(name, tmp_path):
    kind = TRAINERS[name][2]
    make = qwen2_5_vl if name in ("grpo", "dpo", "sft chat") else llava
    found = {layout: history(trainer_of(name, tmp_path, make(), rows(kind), layout=layout)) for layout in LAYOUTS}
    assert len(found["padded"]) == 4
    for layout in LAYOUTS:
        assert found[layout] == pytest.approx(found["padded"], rel=1e-3, abs=1e-4), layout
    assert history(trainer_of(name, tmp_path, make(), rows(kind, seed=50))) != pytest.approx(found["padded"], rel=5e-3)


LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}


@pytest.mark.parametrize("part", ["language", "language_and_projector", "everything"])
def test_adapters_are_on_the_part_that_was_asked_for(tmp_path, part):
    tiny = llava()
    trainer = trainer_of("dpo", tmp_path, tiny, rows("pairs"), peft_config=LoraConfig(**LORA), adapted_part=part)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    parts = {
        key for key in ("language_model", "multi_modal_projector", "vision_tower") if any(key in n for n in trained)
    }
    expected = {"language": 1, "language_and_projector": 2, "everything": 3}[part]
    assert parts == set(["language_model", "multi_modal_projector", "vision_tower"][:expected])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained)
    assert any("language_model" in name for name in moved)


@pytest.mark.parametrize("named", [["q_proj", "linear_1"], r".*vision_tower.*q_proj"])
def test_layers_that_are_named_and_kept_off(tmp_path, named):
    options = {"peft_config": LoraConfig(target_modules=named)}
    with pytest.raises(ConfigError, match="target_modules=.*adapted_part='language'"):
        trainer_of("dpo", tmp_path, llava(), rows("pairs"), **options)
    trainer = trainer_of("dpo", tmp_path, llava(), rows("pairs"), **options, adapted_part="everything")
    assert trainer.model.peft_config["default"].exclude_modules is None


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_sampler_finds_what_training_finds(name, tmp_path):
    """Of a model with M-RoPE: positions go on from the largest, not from the number of tokens."""
    trainer = trainer_of(name, tmp_path, qwen2_5_vl(), rows("prompts"), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-4)
    difference = "sampling/sampling_logp_difference/max"
    assert trainer.state.log_history[0][difference] == pytest.approx(0, abs=1e-3)


def test_adapters_and_a_value_head(tmp_path):
    found = {}
    for layout in LAYOUTS:
        options = {"peft_config": LoraConfig(**LORA), "layout": layout}
        found[layout] = history(trainer_of("ppo", tmp_path, llava(), rows("prompts"), **options))
    assert found["shared"] == pytest.approx(found["padded"], rel=1e-3, abs=1e-4)
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-3, abs=1e-4)


def test_rows_packed_beforehand_keep_their_images(tmp_path):
    """Four documents, of which one has no image and one has two, in one row or in several."""
    apart = history(trainer_of("sft", tmp_path, qwen2_5_vl(), rows("completion"), max_steps=1, max_length=200))
    options = {"max_steps": 1, "packing": True, "max_length": 200}
    trainer = trainer_of("sft", tmp_path, qwen2_5_vl(), rows("completion"), **options)
    assert sorted(n for counts in trainer.train_dataset["image_counts"] for n in counts) == [0, 1, 1, 2]
    assert len(trainer.train_dataset) < 4
    assert history(trainer) == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("name", COLLATED)
def test_a_collator_of_ones_own_brings_images(name, tmp_path, monkeypatch):
    """As scripts have it that call the processor themselves: the loss of rows that the trainer encodes."""
    tiny, data = FAMILIES[name](), rows("chat")
    image = {"type": "image"}

    def turns(row):
        first, *others = row["messages"]
        parts = [*[image] * len(row["images"]), {"type": "text", "text": first["content"]}]
        return [{**first, "content": parts}, *others]

    def collate(batch):
        texts = [tiny.processor.apply_chat_template(turns(row), tokenize=False) for row in batch]
        images = [row["images"] for row in batch if row["images"]] or None
        made = tiny.processor(text=texts, images=images, return_tensors="pt", padding=True)
        untrained = torch.isin(made["input_ids"], torch.tensor(tiny.processor.image_token_ids))
        return {**made, "labels": made["input_ids"].masked_fill(untrained | (made["attention_mask"] == 0), -100)}

    losses = []
    for own in ({}, {"data_collator": collate}):
        skipped = {"dataset_kwargs": {"skip_prepare_dataset": True}} if own else {}
        args = SFTConfig(
            output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True, disable_tqdm=True, **skipped
        )
        trainer = SFTTrainer(tiny.model, args, eval_dataset=data, processing_class=tiny.processor, **own)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    words = tiny.processor.tokenizer
    blind = SFTTrainer(tiny.model, args, eval_dataset=data.select([0]), processing_class=words, **own)
    with pytest.raises(ConfigError, match="processing_class does not process images"):
        blind.evaluate()
    tiny.model.config._name_or_path = str(tmp_path / "model")
    monkeypatch.setattr("trl.trainers.sft.load_processor", lambda model, **_: tiny.processor)
    by_name = SFTTrainer(tiny.model, args, eval_dataset=data, processing_class=words, **own)
    assert by_name.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_options_of_images_without_a_processor(tmp_path, caplog):
    tiny = llava()
    options = {"max_pixels": 64, "image_folder": "images"}
    words = Tiny(tiny.model, tiny.processor)
    words.processor = tiny.processor.tokenizer
    texts = Dataset.from_dict({"text": ["a box"]})
    trainer_of("sft", tmp_path, words, texts, **options)
    assert all(f"{name}={value!r} has no effect with a tokenizer" in caplog.text for name, value in options.items())
    caplog.clear()
    trainer_of("sft", tmp_path, tiny, rows("completion"), max_pixels=64)
    assert "has no effect" not in caplog.text


def test_packing_never_cuts_an_image(tmp_path):
    with pytest.raises(ConfigError, match="packing_strategy='wrapped' splits rows anywhere"):
        trainer_of("sft", tmp_path, llava(), rows("completion"), packing=True, packing_strategy="wrapped")


def test_pixels_are_made_by_the_loaders_workers(tmp_path):
    alone = history(trainer_of("sft", tmp_path, llava(), rows("completion")))
    options = {"dataloader_num_workers": 1}
    assert history(trainer_of("sft", tmp_path, llava(), rows("completion"), **options)) == pytest.approx(
        alone, rel=1e-5
    )


def classifier() -> Tiny:
    """A reward model that reads images: Gemma 3 with one label."""
    tiny = gemma3()
    tiny.model.config.num_labels = 1
    tiny.model = seeded(lambda: Gemma3ForSequenceClassification(tiny.model.config))
    return tiny


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reward_models_learn_from_images_and_reward_them(tmp_path, layout):
    tiny = classifier()
    trainer = RewardTrainer(
        tiny.model,
        RewardConfig(
            str(tmp_path), layout=layout, max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows("pairs"),
        processing_class=tiny.processor,
    )  # fmt: skip
    (loss,) = [entry["loss"] for entry in history_of(trainer) if "loss" in entry]
    assert loss == pytest.approx(expected_loss(), rel=1e-3)


def history_of(trainer) -> list[dict]:
    trainer.train()
    return trainer.state.log_history


def expected_loss() -> float:
    """−log σ(r(chosen) − r(rejected)), where a reward model is asked as a function."""
    tiny = classifier()
    reward = RewardModel(tiny.model, tiny.processor)
    data = rows("pairs")
    images = data["images"]
    better = reward(data["prompt"], data["chosen"], images=images)
    worse = reward(data["prompt"], data["rejected"], images=images)
    margins = torch.tensor(better) - torch.tensor(worse)
    return -torch.nn.functional.logsigmoid(margins).mean().item()


def test_previews_count_the_tokens_of_images(tmp_path, capsys):
    trainer_of("sft", tmp_path, llava(), rows("completion")).preview(2)
    shown = capsys.readouterr().out
    assert "user: [4 image tokens]what is this?" in shown  # one image
    assert "user: [8 image tokens]see" in shown  # two, one after the other
    assert "<image>" not in shown
