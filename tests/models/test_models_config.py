"""What the options of a model become: keyword arguments, an adapter, quantisation."""

import importlib.util

import pytest
import torch

from trl.errors import ConfigError, MissingPackageError
from trl.models.config import ModelConfig, get_peft_config, get_quantization_config


def test_keyword_arguments_of_loading():
    assert ModelConfig().init_kwargs() == {"dtype": "float32"}
    config = ModelConfig(model_revision="v2", dtype="torch.bfloat16", attn_implementation="sdpa")
    assert config.init_kwargs() == {"dtype": "bfloat16", "attn_implementation": "sdpa", "revision": "v2"}
    assert ModelConfig(dtype=None).init_kwargs() == {}


def test_older_name_of_dtype():
    assert ModelConfig(torch_dtype="float16").dtype == "float16"


def test_no_adapter_unless_asked_for():
    assert get_peft_config(ModelConfig(lora_r=4)) is None


def test_adapter():
    config = get_peft_config(
        ModelConfig(
            use_peft=True,
            lora_r=4,
            lora_alpha=8,
            lora_dropout=0.1,
            lora_target_modules=["q_proj", "v_proj"],
            use_dora=True,
        )
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (4, 8, 0.1, True)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.task_type is None


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_architecture_says_what_an_adapter_is_for(make_model, name, task):
    from trl.models.adapters import with_adapters

    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"]))
    adapted = with_adapters(make_model(name), config)
    assert adapted.active_peft_config.task_type == task
    assert config.task_type is None


def test_all_linear_is_a_word_of_its_own():
    assert (
        get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"])).target_modules == "all-linear"
    )


def test_an_architecture_that_peft_does_not_know_gets_adapters_on_all_linear_layers(make_model):
    from trl.models.adapters import with_adapters

    def adapted(name):
        model = with_adapters(make_model(name), get_peft_config(ModelConfig(use_peft=True)))
        names = (n.rpartition(".lora_A.")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n)
        return set(names)

    assert adapted("llama") == {"q_proj", "v_proj"}
    assert adapted("granite") == {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}


def test_layers_to_train_whole_have_to_be_there(make_model):
    from trl.models.adapters import with_adapters

    config = ModelConfig(use_peft=True, lora_modules_to_save=["lmhead"])
    with pytest.raises(ConfigError, match="modules_to_save names 'lmhead', .* no such layer. Did you mean 'lm_head'"):
        with_adapters(make_model("llama"), get_peft_config(config))


def test_options_of_four_bits_without_them_are_said(caplog):
    ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert caplog.text == ""
    ModelConfig(bnb_4bit_quant_type="fp4")
    assert "bnb_4bit_quant_type='fp4' has no effect without load_in_4bit" in caplog.text


def test_all_linear_takes_layers_that_are_packed():
    """Those of GPTQ and AWQ hold whole numbers in place of a weight."""
    from trl.models.adapters import _target_packed_layers

    packed, config = torch.nn.Module(), get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"]))
    packed.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    model = torch.nn.ModuleDict({"up": packed, "norm": torch.nn.LayerNorm(2), "head": torch.nn.Linear(2, 2)})
    _target_packed_layers(config, torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)}))
    assert config.target_modules == "all-linear"
    _target_packed_layers(config, model)
    assert config.target_modules == {"up"}


def test_adapter_trains_on_a_model(make_model):
    from peft import get_peft_model

    config = get_peft_config(ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["all-linear"]))
    trained = [n for n, p in get_peft_model(make_model("llama"), config).named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_no_quantisation_unless_asked_for():
    assert get_quantization_config(ModelConfig()) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_names_the_extra(bits, monkeypatch):
    monkeypatch.setattr("trl.imports.is_available", lambda module: False)
    words = rf'load_in_{bits}bit needs bitsandbytes: pip install "trl\[quantization\]"'
    with pytest.raises(MissingPackageError, match=words):
        get_quantization_config(ModelConfig(**{f"load_in_{bits}bit": True}))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantisation():
    import torch

    config = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16", use_bnb_nested_quant=True))
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat"}, r"Unknown dtype 'bfloat'. Did you mean 'bfloat16'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both set: keep one"),
        ({"bnb_4bit_quant_type": "nf5"}, "Unknown bnb_4bit_quant_type 'nf5'. Did you mean 'nf4'"),
        ({"lora_task_type": "CAUSAL"}, "Unknown lora_task_type 'CAUSAL'. Did you mean 'CAUSAL_LM'"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not a probability"),
        ({"lora_r": 0}, "lora_r=0 is not a rank"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)
