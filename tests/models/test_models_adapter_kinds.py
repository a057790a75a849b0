"""Adapters that are not plain LoRA, and folders that have lost what they were made with."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import make_tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.errors import ConfigError, ModelError
from trl.models.adapters import as_peft_model, new_tokens
from trl.models.load import load_model

IDS = torch.tensor([[5, 9, 12, 7]])
PAIRS = Dataset.from_list([{"prompt": "Hi", "chosen": " a", "rejected": " b"}] * 2)
CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPTS = [PromptTuningConfig(num_virtual_tokens=2, **CAUSAL), PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL)]
DORA = LoraConfig(r=2, use_dora=True, **CAUSAL)


def saved(base: str, config) -> tuple[PeftModel, str]:
    """A model with an adapter whose every number is its own, and the folder that it was saved to."""
    model = get_peft_model(load_model(base), copy.copy(config))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.1 * torch.rand_like(parameter))
    folder = str(Path(base).parent / "adapter")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval(), folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def options(tmp_path, **more) -> dict:
    silent = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "html_report": False, "use_cpu": True}
    return {"output_dir": str(tmp_path / "out"), "max_steps": 1, **silent, **more}


@pytest.mark.parametrize("config", [DORA, IA3Config(**CAUSAL), *PROMPTS], ids=lambda c: c.peft_type.value)
def test_a_folder_of_any_kind_of_adapter_loads_as_it_was(base, config):
    model, folder = saved(base, config)
    torch.testing.assert_close(logits(load_model(folder)), logits(model))


def test_magnitudes_that_transformers_left_out_are_missed(base):
    model, folder = saved(base, DORA)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    if torch.allclose(logits(loaded), logits(model), atol=1e-5):
        assert as_peft_model(loaded)
    else:
        with pytest.raises(ModelError, match="transformers loaded this DoRA adapter without its magnitudes"):
            as_peft_model(loaded)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft: of what it puts before a text
@pytest.mark.parametrize("config", PROMPTS, ids=lambda c: c.peft_type.value)
def test_learned_prompts_train_before_single_sequences(base, tmp_path, config):
    _, folder = saved(base, config)
    trainer = DPOTrainer(folder, args=DPOConfig(**options(tmp_path)), train_dataset=PAIRS)
    assert trainer.layout == "padded"
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference is as it was


@pytest.mark.parametrize("asked", [{"packing": True, "max_length": 32}, {"layout": "packed"}])
def test_learned_prompts_do_not_stand_before_packed_rows(base, tmp_path, asked):
    rows = Dataset.from_list([{"text": "Hi"}] * 2)
    with pytest.raises(ConfigError, match="PROMPT_TUNING.* one sequence"):
        SFTTrainer(
            base, args=SFTConfig(**options(tmp_path, **asked)), train_dataset=rows, peft_config=copy.copy(PROMPTS[0])
        )


def test_an_adapter_whose_base_is_gone_says_what_to_do(base):
    _, folder = saved(base, DORA)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="does not exist. Give the base model as model_name_or_path"):
        load_model(folder)
    settings = Path(folder, "adapter_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        load_model(folder)


def test_what_is_no_configuration_of_an_adapter_is_named(base, tmp_path):
    with pytest.raises(ConfigError, match="peft_config must be .*LoraConfig.*, not a dict"):
        SFTTrainer(base, args=SFTConfig(**options(tmp_path)), train_dataset=PAIRS, peft_config={"r": 2})


def test_tokens_that_the_model_has_no_rows_for_are_not_trained(base):
    model, tokenizer = load_model(base), make_tokenizer()
    tokenizer.add_tokens([f"<t{i}>" for i in range(model.config.vocab_size - len(tokenizer) + 2)])
    assert len(tokenizer) == model.config.vocab_size + 2
    assert new_tokens(model, tokenizer) == []
