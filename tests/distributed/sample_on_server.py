"""One of two processes that train on samples of a server: what it samples, against the engine in process.

python sample_on_server.py FOLDER URL
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.conftest import MODELS, make_tokenizer
from tests.processes import tell
from trl.models.gathering import gathered_parameters
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.server import ServerEngine
from trl.trainers.grpo import GRPOConfig, GRPOTrainer

gc.freeze()
RANK = int(os.environ["RANK"])
ROWS = Dataset.from_dict({"prompt": [f"Say {i}: " for i in range(8)]})


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def most_alive(model: torch.nn.Module) -> int:
    """Tensors of earlier layers that are still held when the next one is given."""
    given, most = [], 0
    for _, tensor in gathered_parameters(model):
        most = max(most, sum(each() is not None for each in given))
        given.append(weakref.ref(tensor))
    return most


def main(folder: Path, url: str, case: str) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"](max_position_embeddings=128)
    if case == "dora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    args = GRPOConfig(
        output_dir=str(folder / case),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        html_report=False,
        disable_tqdm=True,
        use_cpu=True,
        beta=0.0,
    )
    engine = ServerEngine(url, sync_dir=folder / "weights", start_timeout=60)
    trainer = GRPOTrainer(model, length, args, ROWS, processing_class=make_tokenizer(), engine=engine)
    trainer.train()
    prompts = [Prompt([6 + RANK, 7, 8]), *[Prompt([20, 21])] * RANK]  # the second process has one more
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    engine.sync(trainer.model_wrapped, 2)
    found = engine.generate(prompts, params, 2)
    expected = LocalEngine(trainer.model_wrapped, make_tokenizer(), progress=False).generate(prompts, params, 2)
    tell(folder, case, [[[r.ids for r in group] for group in each] for each in (found, expected)])
    tell(folder, f"{case} difference", engine.take_metrics().get("engine/sync_logp_difference", 0.0))
    tell(folder, f"{case} alive", most_alive(trainer.model_wrapped))
    tell(folder, f"{case} folders", (folder / "weights").exists())
    engine.close()


if __name__ == "__main__":
    for name in sys.argv[3:]:
        main(Path(sys.argv[1]), sys.argv[2], name)
