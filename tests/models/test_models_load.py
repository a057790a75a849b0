"""What is found out about a model when it is loaded, and not after hours."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.conftest import MODELS, WIDTHS, make_tokenizer
from trl import (
    AutoModelForCausalLMWithValueHead,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.errors import ConfigError, ModelError, ModelNotFoundError
from trl.models import attention_packages
from trl.models.config import ModelConfig
from trl.models.load import load_config, load_model, mend_generation_config
from trl.models.saved_adapters import hub_options


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.9}, {"top_p": 0.6, "temperature": 0.1}, {"top_k": 3}],
    ids=lambda options: next(iter(options)),
)
def test_a_generation_config_that_forgets_to_sample_can_be_saved(make_model, tmp_path, caplog, options):
    model = make_model("llama")
    model.generation_config.update(do_sample=False, **options)
    with caplog.at_level(logging.WARNING):
        mend_generation_config(model)
    assert "do_sample=True" in caplog.text
    assert next(iter(options)) in caplog.text
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.do_sample


def test_one_that_is_sound_stays_as_it_is(make_model, caplog):
    model = make_model("llama")
    before = model.generation_config.to_dict()
    mend_generation_config(model)
    assert model.generation_config.to_dict() == before
    assert not caplog.text


def test_one_that_nothing_mends_is_an_error_with_the_reason(make_model):
    model = make_model("llama")
    model.generation_config.max_new_tokens = 0
    with pytest.raises(ModelError, match=r"cannot be saved.*max_new_tokens"):
        mend_generation_config(model)


def test_models_by_name_and_as_objects_are_mended(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false}')
    assert load_model(str(tmp_path)).generation_config.do_sample
    model.generation_config.update(do_sample=False, temperature=0.5)
    args = SFTConfig(output_dir=str(tmp_path / "run"), html_report=False, report_to=[])
    rows = Dataset.from_dict({"text": ["a"]})
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.save_model()


# ---- models that other libraries loaded ----


def test_the_loss_of_a_model_that_unsloth_loaded_is_the_trainer_s(make_model, tmp_path):
    model = make_model("llama")
    model._unsloth_cpu_chunked_ce = True
    args = SFTConfig(output_dir=str(tmp_path), html_report=False, report_to=[])
    SFTTrainer(model, args, train_dataset=Dataset.from_dict({"text": ["a"]}), processing_class=make_tokenizer())
    assert not model._unsloth_cpu_chunked_ce


# ---- layers ----


def with_layers(folder, count):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))


def test_a_layer_that_the_weights_lack_is_an_error(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with_layers(tmp_path, 3)
    with pytest.raises(ModelError, match=r"lack 9 parameters of LlamaForCausalLM .*layers.2"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"layers.2"):
        load_model(str(tmp_path), auto_class=AutoModelForSequenceClassification, num_labels=1)


def test_a_layer_that_the_configuration_lacks_is_an_error(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with_layers(tmp_path, 1)
    with pytest.raises(ModelError, match=r"num_hidden_layers=1.*layers.1"):
        load_model(str(tmp_path))


def test_the_head_of_a_classifier_may_be_new(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), auto_class=AutoModelForSequenceClassification, num_labels=1).score is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_language_model(tmp_path, tied):
    config = LlamaConfig(**WIDTHS, num_labels=1, tie_word_embeddings=tied)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds a reward model .*score.weight.*cannot generate text"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("flash_attention_2", ("flash-attn,", "pip install flash-attn ", "sdpa")),
        ("flash_attention_3", ("flash-attn-3", "hopper", "sdpa")),
        ("kernels-community/flash-attn2", ("kernels", "pip install kernels")),
        ({"text_config": "flash_attention_4", "vision_config": "sdpa"}, ("flash-attn-4", "pip install")),
        ("paged|flash_attention_2", ("pip install flash-attn ",)),
    ],
)
def test_attention_whose_package_is_missing_is_said_before_anything_is_read(monkeypatch, asked, names):
    monkeypatch.setattr(attention_packages, "is_installed", lambda package: False)
    for ask in (
        lambda: load_model("./no-such-model", attn_implementation=asked),
        lambda: ModelConfig(attn_implementation=asked),
    ):
        with pytest.raises(ConfigError, match="attn_implementation") as error:
            ask()
        assert [name for name in names if name not in str(error.value)] == []


def test_attention_that_nobody_knows_or_that_needs_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(attention_packages, "is_installed", lambda package: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'spda' is unknown. Did you mean 'sdpa'"):
        load_model("./no-such-model", attn_implementation="spda")
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ConfigError, match=f"{name!r} needs a GPU"):
            load_model("./no-such-model", attn_implementation=name)


# ---- names that nothing stands for ----


def sft(name, model, tokenizer, folder):
    SFTTrainer(name, args=SFTConfig(output_dir=folder), train_dataset=Dataset.from_dict({"text": ["a"]}))


def reward(name, model, tokenizer, folder):
    RewardTrainer(name, train_dataset=Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}))


def reference(name, model, tokenizer, folder):
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    DPOTrainer(model, ref_model=name, args=DPOConfig(output_dir=folder), train_dataset=rows, processing_class=tokenizer)


def reward_function(name, model, tokenizer, folder):
    args = GRPOConfig(output_dir=folder, num_generations=2, per_device_train_batch_size=2)
    GRPOTrainer(model, name, args, Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer)


def value_head(name, model, tokenizer, folder):
    AutoModelForCausalLMWithValueHead.from_pretrained(name)


def adapter(name, model, tokenizer, folder):
    model.save_pretrained(folder)
    load_model(folder, adapter=name)


@pytest.mark.parametrize("name", ["org/none", "./none", "empty"])
@pytest.mark.parametrize(
    ("load", "argument"),
    [
        (sft, "model"),
        (reward, "model"),
        (reference, "ref_model"),
        (reward_function, "reward_funcs|model"),
        (value_head, "model"),
        (adapter, "adapter"),
    ],
)
def test_a_name_that_nothing_stands_for_is_an_error_that_says_so(
    load, argument, name, make_model, tokenizer, tmp_path, monkeypatch
):
    """It is an OSError too, which scripts catch that loaded models by `transformers`."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = {"org/none": "is no folder here.*offline mode", "./none": "no such folder", "empty": "holds no model"}
    with pytest.raises(OSError, match=rf"^({argument})='{name}'.*{said[name]}") as raised:
        load(name, make_model("llama"), tokenizer, str(tmp_path / "out"))
    assert isinstance(raised.value, ModelNotFoundError)


def test_a_folder_without_a_tokenizer_or_weights(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer.*processing_class=tokenizer"):
        sft(str(tmp_path), None, None, str(tmp_path / "out"))
    with pytest.raises(ModelNotFoundError, match="is the folder of a whole model, not of an adapter"):
        load_model(str(tmp_path), adapter=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no weights"):
        load_model(str(tmp_path))


# ---- where the files of a model are ----


def save_tiny(folder, **changes):
    MODELS["llama"](**changes).save_pretrained(folder)
    return folder


def save_adapter(folder, base):
    adapted = get_peft_model(load_model(str(base)), LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", ["inner", "."], ids=["its subfolder", "above it"])
def test_a_tokenizer_is_found_in_the_subfolder_of_its_model_or_above_it(tmp_path, place):
    save_tiny(tmp_path / "inner")
    make_tokenizer().save_pretrained(tmp_path / place)
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, model_init_kwargs={"subfolder": "inner"})
    trainer = SFTTrainer(str(tmp_path), args, train_dataset=Dataset.from_dict({"text": ["Yes."]}))
    assert trainer.tokenizer("Yes.") == make_tokenizer()("Yes.")


def test_an_adapter_is_found_in_a_subfolder(tmp_path):
    save_adapter(tmp_path / "run" / "best", save_tiny(tmp_path / "base"))
    loaded = load_model(str(tmp_path / "run"), subfolder="best")
    assert isinstance(loaded, PeftModel)
    assert load_config(str(tmp_path / "run"), subfolder="best").model_type == "llama"


def cached(cache, name):
    """The folder of the hub's model `name` in a download cache, whose only revision is called `sha`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("sha")
    return repository / "snapshots" / "sha"


def test_the_cache_of_a_model_is_that_of_its_configuration_tokenizer_head_and_adapter(tmp_path):
    base = save_tiny(cached(tmp_path, "me/base"))
    make_tokenizer().save_pretrained(base)
    adapter = save_adapter(cached(tmp_path, "me/adapter"), base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "me/base"}))
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "model_init_kwargs": hub}
    rows = Dataset.from_dict({"prompt": ["Yes?"], "chosen": [" No."], "rejected": [" Yes."]})
    trainers = [
        SFTTrainer("me/base", SFTConfig(**args), train_dataset=Dataset.from_dict({"text": ["Yes."]})),
        DPOTrainer("me/adapter", args=DPOConfig(**args), train_dataset=rows),
        RewardTrainer("me/base", RewardConfig(**args), train_dataset=rows),
    ]
    assert [trainer.tokenizer("Yes.") for trainer in trainers] == [make_tokenizer()("Yes.")] * 3
    assert isinstance(trainers[1].model, PeftModel)
    assert isinstance(load_model("me/base", adapter="me/adapter", **hub), PeftModel)
    with_head = AutoModelForCausalLMWithValueHead.from_pretrained("me/adapter", **hub)
    assert isinstance(with_head.pretrained_model, PeftModel)


def test_a_revision_is_that_of_the_model_and_not_of_its_adapter(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    assert hub_options({"revision": "v2", "token": "t", "dtype": "bfloat16"}) == {"revision": "v2", "token": "t"}
    assert hub_options({"revision": "v2", "token": "t"}, of_another=True) == {"token": "t"}
    assert isinstance(load_model(str(base), adapter=str(adapter), revision="v2"), PeftModel)
