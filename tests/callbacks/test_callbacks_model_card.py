"""Cards of models: what the hub reads of them, what people do, and what must not be in them."""

from __future__ import annotations

import re

import pytest
import yaml

from trl.callbacks.model_card import Trained, hub_id, last_metrics, license_of, published, write_model_card
from trl.trainers.sft import SFTConfig


def card(folder, model, **options):
    """The front matter and the text of a card."""
    args = SFTConfig(output_dir=str(folder / "qwen-sft"), learning_rate=1e-3, report_to="none")
    trainer = options.pop("trainer", "SFTTrainer")
    write_model_card(args, trainer=trainer, model=model, data=["train: 8 rows"], **options)
    text = (folder / "qwen-sft" / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(front), body


def test_a_whole_model(tmp_path):
    log = [{"step": 1, "loss": 3.0, "grad_norm": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
    front, body = card(
        tmp_path, Trained("Qwen/Qwen2.5-0.5B"), log=log, options={"packing": True, "output_dir": "/home/me"}
    )
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert (front["library_name"], front["pipeline_tag"], front["tags"]) == (
        "transformers",
        "text-generation",
        ["trl", "sft"],
    )
    assert "`Qwen/Qwen2.5-0.5B`, trained with SFT by `SFTTrainer` of trl." in body
    assert "| `loss` | 2 |\n| `eval_loss` | 2.5 |" in body
    assert "| `packing` | True |" in body
    assert 'AutoModelForCausalLM.from_pretrained("qwen-sft")' in body
    assert "arXiv:2203.02155" in body
    assert "/home/me" not in body
    assert str(tmp_path) not in body


def test_a_chat_model_is_used_with_its_template(tmp_path):
    _, body = card(tmp_path, Trained("gpt2"))
    assert 'inputs = tokenizer("A prompt"' in body
    _, body = card(tmp_path, Trained("gpt2", is_chat=True))
    assert "apply_chat_template(\n    messages, add_generation_prompt=True" in body


def test_a_title_is_no_name_to_load_by(tmp_path):
    _, body = card(tmp_path, Trained("org/pictures", "pictures"), trainer="DDPOTrainer", model_name="My DDPO Model")
    assert "# My DDPO Model\n" in body
    assert 'DiffusionPipeline.from_pretrained("qwen-sft")' in body


def test_an_adapter_says_so(tmp_path):
    front, body = card(tmp_path, Trained("gpt2", is_adapter=True))
    assert (front["library_name"], front["base_model"]) == ("peft", "gpt2")
    assert "lora" in front["tags"]
    assert "An adapter of `gpt2`, trained with SFT" in body


def test_an_adapter_of_pictures_is_loaded_into_its_base(tmp_path):
    front, body = card(tmp_path, Trained("org/pictures", "pictures", is_adapter=True), trainer="DiffusionGRPOTrainer")
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "lora" in front["tags"]
    assert 'DiffusionPipeline.from_pretrained("org/pictures")\npipeline.load_lora_weights("qwen-sft")' in body
    assert "arXiv:2505.05470" in body


def test_a_reward_model(tmp_path):
    front, body = card(tmp_path, Trained(None, "reward"), trainer="RewardTrainer")
    assert front["pipeline_tag"] == "text-classification"
    assert "base_model" not in front
    assert 'RewardModel("qwen-sft")' in body
    assert "A model made from a configuration, trained with Reward" in body


def test_a_folder_of_this_machine_is_no_public_name(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# base\n")
    front, body = card(tmp_path, Trained(str(tmp_path / "base")))
    assert "base_model" not in front
    assert front["license"] == "apache-2.0"
    assert "A model that has no public name" in body
    assert str(tmp_path) not in body


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("gpt2", True),
        ("org/model.v1", True),
        ("/tmp/model", False),
        ("./model", False),
        ("a/b/c", False),
        (None, False),
    ],
)
def test_names_that_others_can_use(name, public):
    assert (hub_id(name) is not None) == public


def test_options_that_are_published():
    given = {
        "seed": 1,
        "chat_template_path": "a.jinja",
        "hub_token": "secret",
        "deepspeed": "/etc/zero.json",
        "optim": "adamw",
    }
    assert published(given) == {"seed": 1, "optim": "adamw"}


def test_the_last_of_each_metric():
    assert last_metrics([{"loss": 2.0, "lr": 1}, {"loss": 1.23456}]) == {"loss": "1.235"}
    assert license_of(None) is None
