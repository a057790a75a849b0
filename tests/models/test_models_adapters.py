"""Adapters: a folder of one is a model, grown vocabularies load and train, and merging changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import MODELS, make_tokenizer
from trl import (
    AutoModelForCausalLMWithValueHead,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.cli.main import main
from trl.errors import ConfigError, ModelError
from trl.models.adapters import as_peft_model, new_tokens
from trl.models.load import load_model, load_processor
from trl.models.saved_adapters import is_adapter

IDS = torch.tensor([[5, 9, 12, 7]])
PAIRS = Dataset.from_list([{"prompt": "Hi", "chosen": " a", "rejected": " b"}] * 4)
CHATS = Dataset.from_list([{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}] * 4)


@pytest.fixture
def adapter(base, tmp_path) -> str:
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def options(tmp_path, **more) -> dict:
    silent = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "html_report": False, "use_cpu": True}
    return {"output_dir": str(tmp_path / "out"), "max_steps": 1, "learning_rate": 0.1, **silent, **more}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_folder_of_an_adapter_is_a_model(adapter, base):
    assert is_adapter(adapter)
    assert not is_adapter(base)
    loaded = load_model(adapter)
    expected = PeftModel.from_pretrained(load_model(base), adapter)
    assert torch.equal(logits(loaded.eval()), logits(expected.eval()))
    assert {parameter.requires_grad for name, parameter in loaded.named_parameters() if "lora_" in name} == {True}
    assert torch.equal(logits(load_model(base, adapter=adapter).eval()), logits(expected))


def test_what_transformers_makes_of_the_folder_trains_as_a_peft_model(adapter, tmp_path):
    inside = AutoModelForCausalLM.from_pretrained(adapter)
    before = logits(inside.eval())
    model = as_peft_model(inside)
    assert torch.allclose(logits(model.eval()), before, atol=1e-6)
    config = SFTConfig(**options(tmp_path))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(adapter), config, train_dataset=CHATS, processing_class=make_tokenizer()
    )
    trainer.train()
    assert (logits(trainer.model.eval()) - before).abs().max() > 1e-3


def test_the_reference_of_an_adapter_is_the_adapter_as_it_was(adapter, tmp_path):
    """At the start policy and reference are one, so the loss is ln 2, and afterwards they are not."""
    trainer = DPOTrainer(
        adapter, args=DPOConfig(**options(tmp_path, max_steps=2, logging_steps=1)), train_dataset=PAIRS
    )
    trainer.train()
    first, second = (log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert first == pytest.approx(0.693147, abs=1e-4)
    assert second < first - 0.01


def test_another_adapter_on_top_is_refused_with_what_to_do(adapter, tmp_path):
    with pytest.raises(ConfigError, match="already carries the adapter.*trl merge"):
        SFTTrainer(adapter, SFTConfig(**options(tmp_path)), train_dataset=CHATS, peft_config=LoraConfig())


def test_a_reward_model_begins_with_an_adapter_and_its_head_trains(adapter, tmp_path):
    trainer = RewardTrainer(adapter, RewardConfig(**options(tmp_path)), train_dataset=PAIRS)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert any("lora_" in name for name in trained)
    trainer.save_model(str(tmp_path / "reward"))
    with pytest.raises(ModelError, match="adapter of a reward model"):
        load_model(str(tmp_path / "reward"))


def test_a_policy_of_ppo_begins_with_an_adapter(adapter, tmp_path):
    trainer = PPOTrainer(PPOConfig(**options(tmp_path)), adapter)
    assert isinstance(trainer.model.pretrained_model, PeftModel)
    expected = load_model(adapter).eval()
    assert torch.equal(logits(trainer.model.pretrained_model.eval()), logits(expected))


# ---- vocabularies that grew ----


@pytest.fixture
def chat_tokenizer(tmp_path) -> str:
    """A tokenizer whose template has two tokens that the base does not know, behind more than it has room for."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    tokenizer.add_tokens(["<|new|>", "<|over|>"], special_tokens=True)
    tokenizer.eos_token = "<|over|>"
    tokenizer.chat_template = "{% for m in messages %}<|new|>{{ m.content }}<|over|>{% endfor %}{% if add_generation_prompt %}<|new|>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_train_with_an_adapter_and_load_again(tied, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    MODELS["llama"](tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = SFTConfig(**options(tmp_path, chat_template_path=chat_tokenizer, max_steps=2))
    trainer = SFTTrainer(
        str(tmp_path / "base"), config, train_dataset=CHATS, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    new = trainer.tokenizer.convert_tokens_to_ids(["<|new|>", "<|over|>"])
    see = lambda: trainer.model.get_input_embeddings()(torch.tensor(new)).detach().clone()  # noqa: E731
    before = see()
    trainer.train()
    assert (see() - before).abs().max() > 0.01
    trainer.save_model(str(tmp_path / "out"))
    loaded, ids = load_model(str(tmp_path / "out")).eval(), torch.tensor([[5, *new]])
    known = len(trainer.tokenizer)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits[..., :known]
        assert torch.allclose(loaded(input_ids=ids).logits[..., :known], expected, atol=1e-5)
    assert load_processor(loaded.get_base_model(), str(tmp_path / "out")).convert_tokens_to_ids("<|new|>") == new[0]
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "out"))


def test_whole_embeddings_that_were_saved_with_an_adapter_load(base, tmp_path):
    torch.manual_seed(2)
    model = load_model(base)
    model.resize_token_embeddings(128, mean_resizing=False)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(tmp_path / "grown"), save_embedding_layers=True)
    assert torch.equal(logits(load_model(str(tmp_path / "grown")).eval()), logits(adapted))


def test_tokens_of_a_resize_are_new(base):
    model, tokenizer = load_model(base), make_tokenizer()
    first = model.config.vocab_size
    tokenizer.add_tokens([f"<{i}>" for i in range(first - len(tokenizer) + 2)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert new_tokens(model, tokenizer) == [first, first + 1]


def test_tokens_of_a_resize_are_new_in_a_model_of_the_hub(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "models--org--model/snapshots/0")
    (tmp_path / "models--org--model/refs").mkdir()
    (tmp_path / "models--org--model/refs/main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = load_model("org/model"), make_tokenizer()
    first = model.config.vocab_size
    tokenizer.add_tokens([f"<{i}>" for i in range(first - len(tokenizer) + 1)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert new_tokens(model, tokenizer) == [first]


def test_other_adapters_say_that_new_tokens_do_not_train(base, chat_tokenizer, tmp_path, caplog):
    config = SFTConfig(**options(tmp_path, chat_template_path=chat_tokenizer))
    peft_config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    SFTTrainer(base, config, train_dataset=CHATS, peft_config=peft_config)
    assert "42 tokens are new" in caplog.text
    assert "use LoRA" in caplog.text


def test_a_template_with_new_tokens_on_an_adapter_is_refused(adapter, chat_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="adds 42 tokens.*trl merge"):
        SFTTrainer(adapter, SFTConfig(**options(tmp_path, chat_template_path=chat_tokenizer)), train_dataset=CHATS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_trainable_tokens_on_embeddings_and_head(tied, both, tmp_path):
    torch.manual_seed(0)
    tokens = {"embed_tokens": [6, 7], "lm_head": [6, 7]} if both else [6, 7]
    trainer = SFTTrainer(
        MODELS["llama"](tie_word_embeddings=tied),
        SFTConfig(**options(tmp_path)),
        train_dataset=CHATS,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens),
    )
    trainer.train()
    assert trainer.state.global_step == 1


# ---- trl merge ----


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merging_changes_nothing_but_the_precision(dtype, adapter, tmp_path, capsys):
    out = str(tmp_path / "merged")
    assert main(["merge", "--model_name_or_path", adapter, "--output_dir", out, "--dtype", dtype]) == 0
    whole = AutoModelForCausalLM.from_pretrained(out)
    expected = logits(load_model(adapter).eval())
    assert whole.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert torch.allclose(logits(whole.eval()).float(), expected, atol=1e-5 if dtype == "auto" else 0.1)
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template
    assert not is_adapter(out)
    assert main(["merge", "--model_name_or_path", adapter, "--output_dir", out]) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_a_value_head_is_merged_with_its_policy(adapter, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(adapter).eval()
    model.save_pretrained(str(tmp_path / "policy"))
    out = str(tmp_path / "merged")
    assert main(["merge", "--model_name_or_path", str(tmp_path / "policy"), "--output_dir", out]) == 0
    whole = AutoModelForCausalLMWithValueHead.from_pretrained(out).eval()
    with torch.no_grad():
        for found, expected in zip(whole(IDS)[::2], model(IDS)[::2], strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_whole_model_has_nothing_to_merge(base, tmp_path, capsys):
    assert main(["merge", "--model_name_or_path", base, "--output_dir", str(tmp_path / "out")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_commands_take_the_folder_of_an_adapter(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in PAIRS))
    words = ["dpo", "--model_name_or_path", adapter, "--dataset_name", "pairs.jsonl", "--use_cpu", "--max_steps", "1"]
    assert main(["check", *words, "--report_to", "none"]) == 0
    assert "Ready to train." in capsys.readouterr().out
