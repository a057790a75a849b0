"""What docs/diffusion.md and docs/ddpo.md say can be done is done, with tiny pipelines under the names in them.

Numbers that say how long a run is are those of real models on the page, and small ones here.
"""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

import trl.rewards
from tests.diffusion.pipelines import stable_diffusion, stable_diffusion_3
from tests.docs.test_docs_code import blocks_of, check_yaml, write_file
from trl.cli.commands import methods
from trl.cli.main import main
from trl.rewards import brightness_reward

PAGES = ["docs/diffusion.md", "docs/ddpo.md"]
NAMES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "stabilityai/stable-diffusion-3.5-medium": stable_diffusion_3,
}
SHORT = {
    "num_epochs=200, sample_batch_size=4, sample_num_batches_per_epoch=4": "num_epochs=1, sample_num_steps=2, "
    "sample_batch_size=2, sample_num_batches_per_epoch=1",
    '"sd3-grpo",': '"sd3-grpo", num_inference_steps=2, max_sequence_length=8, **RUN,',
    '"sd-ddpo", per': '"sd-ddpo", num_inference_steps=2, **RUN, per',
    '"sd-dpo",': '"sd-dpo", **RUN,',
    "per_device_train_batch_size=8": "per_device_train_batch_size=2",
    "gradient_accumulation_steps=6": "gradient_accumulation_steps=1",
    "gradient_accumulation_steps=4": "gradient_accumulation_steps=1",
    "num_generations=24": "num_generations=2",
}
"""What stands on the page, and what is run."""
RUN = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "num_pictures": 0, "disable_tqdm": True}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with tiny pipelines and pictures by the names of the pages."""
    for name, make in NAMES.items():
        make().save_pretrained(tmp_path / name)
    (tmp_path / "pictures").mkdir()
    for number in (1, 2):
        for kind, value in (("better", 255), ("worse", 0)):
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / "pictures" / f"{number}-{kind}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    monkeypatch.setattr(trl.rewards, "get_clip_reward", lambda: brightness_reward)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_in_python(page, home):
    blocks = blocks_of(page)
    for block in blocks:
        if block.language == "jsonl":
            write_file(block)
    names: dict[str, object] = {"__name__": "page", "RUN": RUN}
    torch.manual_seed(0)
    for block in blocks:
        if block.language == "python":
            code = block.text
            for words, short in SHORT.items():
                code = code.replace(words, short)
            exec(compile(code, page, "exec"), names)
    assert names["trainer"].state.global_step >= 1


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_on_the_command_line(page, home, capsys):
    """Files and flags are read by the parsers of their commands, and `check` runs."""
    blocks = blocks_of(page)
    for block in blocks:
        if block.language in ("yaml", "jsonl"):
            write_file(block)
        if block.language == "yaml":
            check_yaml(block)
    commands = [words for block in blocks if block.language == "bash" for words in block.commands]
    assert {words[0] for words in commands} == {"trl"}
    for words in commands:
        if words[1] in methods():
            methods()[words[1]].parser().parse(words[2:])
        elif words[1] == "check":
            assert main([*words[1:], "--reward_funcs", "brightness_reward", "--num_inference_steps", "2"]) == 0
            assert "Ready to train" in capsys.readouterr().out
