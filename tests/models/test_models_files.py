"""Which files hold weights."""

import json
import os

import pytest
from datasets import Dataset
from peft import LoraConfig

from trl import AutoModelForCausalLMWithValueHead, SFTConfig, SFTTrainer
from trl.models.files import SHARDS, WEIGHTS, is_cut_short


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "llama-q4.gguf",
    ],
)
def test_weights(name):
    assert WEIGHTS.fullmatch(name)


@pytest.mark.parametrize("name", ["training_args.bin", "value_head.safetensors", "optimizer.bin", "model.onnx"])
def test_what_a_model_is_not_loaded_from(name):
    assert not WEIGHTS.fullmatch(name)


def test_shards():
    assert SHARDS.fullmatch("pytorch_model_fsdp_0")
    assert SHARDS.fullmatch("global_step8")
    assert not SHARDS.fullmatch("checkpoint-8")


def test_a_file_is_as_long_as_its_header_says(tmp_path):
    """8 bytes of length, the header, and 12 bytes of two tensors."""
    spans = {"a": {"data_offsets": [0, 8]}, "b": {"data_offsets": [8, 12]}, "__metadata__": {"format": "pt"}}
    header = json.dumps(spans).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(12)
    file = tmp_path / "model.safetensors"
    for content, short in ((whole, False), (whole[:-1], True), (whole[:20], True), (whole[:3], True)):
        file.write_bytes(content)
        assert is_cut_short(file) is short


# ---- who may read what is written ----


def private(folder):
    """Files below that are not of the mode that new files have here."""
    probe = folder / "probe"
    probe.touch()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if path.stat().st_mode != probe.stat().st_mode]


@pytest.fixture
def for_the_group():
    before = os.umask(0o007)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes")
def test_what_trainers_write_follows_the_umask(for_the_group, make_model, tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["a b"] * 4})
    options = {"output_dir": str(tmp_path), "max_steps": 1, "save_steps": 1, "disable_tqdm": True, "report_to": "none"}
    trainer = SFTTrainer(
        make_model("llama"), SFTConfig(**options), None, rows, processing_class=tokenizer, peft_config=LoraConfig()
    )
    trainer.train()
    trainer.save_model()
    AutoModelForCausalLMWithValueHead.from_pretrained(make_model("llama")).save_pretrained(tmp_path / "value")
    assert len([*tmp_path.rglob("*.safetensors")]) == 4
    assert private(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes")
@pytest.mark.parametrize("has_adapter", [True, False])
def test_pipelines_follow_the_umask(for_the_group, has_adapter, tmp_path):
    pytest.importorskip("diffusers")
    from tests.diffusion.pipelines import PIPELINES
    from trl.diffusion.pipelines import add_adapter, save_whole

    pipeline = PIPELINES["sd"]()
    add_adapter(pipeline.unet, LoraConfig(target_modules=["to_q"]) if has_adapter else None, "unet")
    save_whole(pipeline, "unet", tmp_path)
    assert private(tmp_path) == []
