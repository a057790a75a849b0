"""Adapters on quantised weights: all of them learn, whether the model comes by name or as an object."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from tests.conftest import make_tokenizer
from tests.models.test_models_graphs import Recorder, assert_same, batch_of, step
from tests.vision.support import llava
from tests.vision.test_vision_training import rows, trainer_of
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.imports import is_available
from trl.models.graphs import LAUNCH_BOUND_FLOPS, capture_layers, captures, graphs_of, without_graphs
from trl.models.load import keep_unpacked
from trl.models.score import prepare_scoring
from trl.models.varlen import VARLEN, switch

pytestmark = pytest.mark.skipif(not is_available("bitsandbytes"), reason="bitsandbytes is not installed")

BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TEXTS = Dataset.from_dict({"text": ["A fox.", "It runs far."]})
PAIRS = Dataset.from_dict({"prompt": ["Why"] * 2, "chosen": [" so"] * 2, "rejected": [" no"] * 2})
WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
"""Quantised weights come in blocks of 64."""


def options(folder):
    shown = {"save_strategy": "no", "disable_tqdm": True, "html_report": False, "report_to": []}
    return {"output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, **shown}


def trained(trainer):
    """Which of the adapter's matrices moved, of how many: B is 0 at first, and A has a gradient from the second step on."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt")
        trainer.train()
    after = dict(trainer.model.named_parameters())
    return sum(not torch.equal(after[name], value) for name, value in before.items()), len(before)


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_on_a_model_by_name_learns_in_every_layer(make_model, tmp_path, bits):
    make_model("llama", **WIDE).save_pretrained(tmp_path / "base")
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        SFTConfig(**options(tmp_path / "run")),
        train_dataset=TEXTS,
        processing_class=make_tokenizer(),
        quantization_config=BitsAndBytesConfig(**BITS[bits]),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    moved, adapters = trained(trainer)
    assert moved == adapters == 2 * 7 * 2


def test_an_adapter_on_a_model_as_an_object_learns_in_every_layer(make_model, tmp_path):
    make_model("llama", **WIDE).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**BITS["nf4"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    with torch.no_grad():  # what packs weights on some processors comes from the trainer as well
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**options(tmp_path / "run")),
            train_dataset=PAIRS,
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        )
    assert not any(vars(module).get("support_avx512bf16_for_cpu") for module in model.modules())
    moved, adapters = trained(trainer)
    assert moved == adapters == 2 * 2 * 2


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize(("name", "kind"), [("sft", "completion"), ("dpo", "pairs")])
def test_an_adapter_on_a_quantised_model_that_reads_images_learns(tmp_path, bits, name, kind):
    """The image encoder and the projector are quantised as well, and stay as they are."""
    tiny = llava()
    tiny.model.save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(**BITS[bits])
    tiny.model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", quantization_config=quantised)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    trainer = trainer_of(name, tmp_path / "run", tiny, rows(kind), peft_config=adapter, max_steps=2)
    moved, count = trained(trainer)
    assert moved == count > 0
    assert trainer.layout == ("packed" if name == "sft" else "shared")


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_an_adapter_on_four_bits_is_replayed(make_model, tmp_path, bits):
    """With what stands in for CUDA's graphs."""
    make_model("llama", **WIDE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(**BITS[bits]), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    keep_unpacked(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    prepare_scoring(model)
    switch(model, VARLEN)
    recorder = Recorder()
    capture_layers(model, recorder)
    for number in range(4):
        batch = batch_of(number, 1)
        found = step(adapted, batch)
        found = found[0], {name: None if g is None else g.clone() for name, g in found[1].items()}
        with without_graphs(model):
            assert_same(found, step(adapted, batch))
    assert recorder.recorded == 2
    packed = model.model.layers[0].mlp.down_proj.base_layer.weight
    packed.quant_state.absmax = (
        packed.quant_state.absmax.clone()
    )  # a graph of CUDA would read the scales that were there
    before = graphs_of(model).count
    for _ in range(2):
        step(adapted, batch)
    assert graphs_of(model).count == before + 1
    numbers = 4 * 64 * 64 + 3 * 64 * 64 + 2 * 64 + 7 * 2 * (64 + 64)  # attention, MLP, norms, adapters
    assert captures(model, int(0.99 * LAUNCH_BOUND_FLOPS / 6 / numbers))
    assert not captures(model, int(1.01 * LAUNCH_BOUND_FLOPS / 6 / numbers))
