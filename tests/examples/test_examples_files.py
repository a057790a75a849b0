"""Files of examples/configs are taken by their commands, with what they say today."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl.cli.commands import methods

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_taken_by_its_command(path):
    command = path.read_text().splitlines()[0].split("trl ")[1].split()[0]
    parsed = methods()[command].parser().parse(["--config", str(path)])
    assert {"model_name_or_path", "dataset_name", "learning_rate", "output_dir"} <= set(parsed.values)


def test_every_training_command_has_one():
    shown = {path.stem.replace("_", "-") for path in CONFIGS}
    assert {"sft", "reward", "dpo", "cpo", "orpo", "kto", "ppo", "grpo", "rloo", "online-dpo"} <= shown
