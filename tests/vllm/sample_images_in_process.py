"""Images in vLLM in this process, with weights of several steps. Run by the Python of an environment with vLLM.

python sample_images_in_process.py FOLDER FAMILY
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vllm.images import check_after_images, image_prompts, reader
from tests.vllm.support import PARAMS
from trl.errors import EngineError
from trl.rollouts.vllm import VLLMEngine


def main(folder: Path, family: str) -> None:
    warnings.simplefilter("ignore")
    models = [reader(family, seed, folder / f"model-{seed}") for seed in (1, 2)]
    engine = VLLMEngine(models[0].processor, sync_dir=folder, max_model_len=512, enforce_eager=True)
    differences = []
    for step, tiny in enumerate(
        models
    ):  # the encoder's weights differ, too: its features of earlier images are of no use
        engine.sync(tiny.model, step)
        differences.append(check_after_images(tiny, engine))
    _, (prompt, *_) = image_prompts(tiny)
    with pytest.raises(EngineError, match="tokens there and .* in the trainer"):
        engine.generate([replace(prompt, ids=[*prompt.ids, 7])], PARAMS)
    (folder / "found.json").write_text(json.dumps(differences))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
