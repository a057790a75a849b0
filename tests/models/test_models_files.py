"""Which files hold weights."""

import json

import pytest

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
