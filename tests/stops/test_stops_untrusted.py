"""Folders from elsewhere: what is in them is data. Each test is an attack that would leave something behind."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.conftest import MODELS, make_tokenizer
from tests.stops.runs import RUNS
from trl.data.chat import ChatTemplate
from trl.data.chat_formats import clone_chat_template
from trl.data.sources import ScriptArguments, load_dataset_argument
from trl.errors import ConfigError, DataError, ModelError
from trl.models.config import ModelConfig
from trl.models.load import load_model
from trl.models.value_heads.storage import stored_head
from trl.rewards.model import RewardModel
from trl.trainers.config import TrainerConfig
from trl.training.checkpoint import MANIFEST, newest_checkpoint, why_not_resumable

CODE = "open({path!r}, 'w').close()\n"


@pytest.fixture
def prey(tmp_path) -> Path:
    """What must not be there afterwards."""
    return tmp_path / "prey"


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_attack_works_where_it_is_let(prey, tmp_path):
    torch.save(Attack(prey), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert prey.exists()


@pytest.fixture
def model(tmp_path) -> Path:
    """The folder of a model."""
    folder = tmp_path / "model"
    MODELS["llama"]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- pickles ----


def test_a_model_of_pickles(model, prey):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Attack(prey)}, model / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_model(str(model))
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        stored_head(str(model), {})
    assert not prey.exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    RUNS["bco"](folder, save_strategy="steps", save_steps=1, max_steps=2).train()
    return folder


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    """A checkpoint from elsewhere: it says what its files are like."""
    shutil.copytree(written, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    return tmp_path / "run" / "checkpoint-2"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_state.pt", "trl_state_0.pt"])
def test_a_checkpoint_of_pickles(checkpoint, prey, file):
    state = torch.load(checkpoint / file, weights_only=file != "rng_state.pth")
    torch.save({**state, "more": Attack(prey)}, checkpoint / file)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        RUNS["bco"](checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))
    assert not prey.exists()


def test_weights_of_a_checkpoint_as_a_pickle(checkpoint, prey):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Attack(prey)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        RUNS["bco"](checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))
    assert not prey.exists()


def test_arguments_in_a_checkpoint_are_never_read(checkpoint, prey):
    """transformers keeps them as a pickle, for people to look at."""
    torch.save(Attack(prey), checkpoint / "training_args.bin")
    trainer = RUNS["bco"](checkpoint.parent, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
    assert not prey.exists()


@pytest.mark.parametrize("name", ["data.pkl", "train.pkl", "data.pt"])
def test_a_dataset_of_pickles(tmp_path, prey, name):
    (tmp_path / "data").mkdir()
    torch.save(Attack(prey), tmp_path / "data" / name)
    with pytest.raises(Exception, match="data"):
        load_dataset_argument(ScriptArguments(dataset_name=str(tmp_path / "data")))
    assert not prey.exists()


# ---- code ----


def with_code(folder: Path, prey: Path, **auto: str) -> None:
    (folder / "evil.py").write_text(CODE.format(path=str(prey)) + "class Evil: pass\n")
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text())
        settings |= {"auto_map": auto, "model_type": "evil", "tokenizer_class": "Evil"}
        (folder / file).write_text(json.dumps(settings))


def test_code_in_a_model(model, prey):
    with_code(model, prey, AutoConfig="evil.Evil", AutoModelForCausalLM="evil.Evil", AutoTokenizer=["evil.Evil", None])
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(model))
    with pytest.raises(ValueError, match="trust_remote_code"):
        RewardModel(str(model))
    with pytest.raises(ValueError, match="trust_remote_code"):
        clone_chat_template(MODELS["llama"](), make_tokenizer(), str(model))
    assert not prey.exists()


def test_code_runs_for_nobody_who_did_not_ask():
    assert ModelConfig().trust_remote_code is False
    assert TrainerConfig().trust_remote_code is False


def test_code_in_a_dataset(tmp_path, prey):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(CODE.format(path=str(prey)))
    with pytest.raises(Exception, match="data"):
        load_dataset_argument(ScriptArguments(dataset_name=str(tmp_path / "data")))
    assert not prey.exists()


# ---- templates ----


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch PREY') }}",
        "{{ raise_exception.__globals__['__builtins__'].open('PREY', 'w') }}",
        "{{ messages.append({'role': 'user', 'content': ''}) }}",
        "{% set _ = messages[0].update({'content': 'other'}) %}",
    ],
)
def test_templates_are_rendered_in_a_sandbox(template, prey):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.replace("PREY", str(prey))
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(
        DataError, match="cannot render messages of roles user: .*(unsafe|not safely callable|undefined)"
    ):
        ChatTemplate(tokenizer).render(messages)
    assert messages == [{"role": "user", "content": "Hi"}]
    assert not prey.exists()


# ---- paths ----


def leads_outside(folder: Path) -> Path:
    """Weights whose index names a file beside the folder."""
    weights = load_file(folder / "model.safetensors")
    outside = folder.parent / "outside.safetensors"
    save_file(weights, outside, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys([*weights, "v_head.summary.weight"], "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_weights_that_are_elsewhere(model):
    with pytest.raises(ModelError, match=r"names the file '../outside.safetensors', which is not in that folder"):
        load_model(str(leads_outside(model)))
    with pytest.raises(ModelError, match="which is not in that folder"):
        stored_head(str(model), {})


def test_a_checkpoint_whose_weights_are_elsewhere(checkpoint):
    leads_outside(checkpoint)
    assert "names the file '../outside.safetensors'" in why_not_resumable(checkpoint)
    assert newest_checkpoint(checkpoint.parent) == checkpoint.parent / "checkpoint-1"
    with pytest.raises(ConfigError, match="its weights cannot be trusted"):
        RUNS["bco"](checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))


def test_the_best_checkpoint_is_one_of_the_run(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-9")
    file = checkpoint / "trainer_state.json"
    state = {**json.loads(file.read_text()), "best_model_checkpoint": str(tmp_path / "checkpoint-9")}
    for step, found in ((9, None), (1, str(checkpoint.parent / "checkpoint-1"))):
        file.write_text(json.dumps({**state, "best_global_step": step}))
        trainer = RUNS["bco"](checkpoint.parent, max_steps=3)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.best_model_checkpoint == found


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter extracted tar:DeprecationWarning")  # datasets'
def test_archives_are_unpacked_into_their_folder(tmp_path, monkeypatch):
    """By datasets, which refuses what would leave it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        archive.add(rows, "rows.jsonl")
        archive.add(rows, "../../../../escaped.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "a" / "b" / "c" / "d"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(tmp_path / "a" / "b" / "c" / "d"))
    load_dataset("json", data_files=str(tmp_path / "rows.tar"), cache_dir=str(tmp_path / "a" / "b" / "c" / "d"))
    assert not list(tmp_path.rglob("escaped.jsonl"))


def test_the_tokenizer_of_a_folder_is_data(model):
    """What the other tests spoil works when it is left alone."""
    assert AutoTokenizer.from_pretrained(model).chat_template
    assert load_model(str(model)).config.model_type == "llama"
