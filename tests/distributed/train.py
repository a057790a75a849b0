"""Train named cases in one process or as one of several, and leave losses and saved models in a folder.

python train.py FOLDER sft dpo+lora …         launched by test_engines.py, with and without an engine
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.conftest import MODELS, WIDTHS, make_tokenizer
from tests.models.test_models_graphs import Recorder
from trl.algorithms.entropy_control import EntropyBonus
from trl.algorithms.rloo import ReinforcePlusPlus
from trl.models.value_heads.auto_models import with_value_head
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.base import BaseTrainer
from trl.trainers.dpo import DPOTrainer
from trl.trainers.grpo import GRPOTrainer
from trl.trainers.kto import KTOTrainer
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_dpo import OnlineDPOTrainer
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.reward import RewardTrainer
from trl.trainers.rloo import RLOOTrainer
from trl.trainers.sft import SFTTrainer

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
gc.freeze()  # what was imported: every case collects garbage
STEPS, BATCH = 10, 4
TEXT = "the quick brown fox jumps over a lazy dog and then runs far away from the sleepy old farm"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[i % 7 : 3 + i % 7 + i % 3]) for i in range(12)]
GOOD = [f" {WORDS[i]} {i}" * (1 + i % 3) for i in range(12)]
BAD = [f" {WORDS[-i - 1]}" * (1 + i % 4) for i in range(12)]
TEXTS = [" ".join(WORDS[i % 5 : 5 + i]) for i in range(12)]
STREAM = Dataset.from_dict({"text": TEXTS[:7]}).to_iterable_dataset()
SMALL = {"hidden_size": 16, "intermediate_size": 24}


class Scripted(RolloutEngine):
    """An engine that samples the same responses to the same prompts, whoever asks; the policy plays no part."""

    def sync(self, model: torch.nn.Module, step: int) -> None: ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int) -> list[list[Rollout]]:
        return [[self._sample(prompt, i) for i in range(n)] for prompt in prompts]

    def _sample(self, prompt: Prompt, number: int) -> Rollout:
        generator = torch.Generator().manual_seed(sum(prompt.ids) + number)
        length = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(3, 99, (length,), generator=generator).tolist()
        return Rollout(tuple(ids), (-4.6,) * length, "length")


def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS["llama"](**SMALL)


def tied() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS["llama"](**SMALL, tie_word_embeddings=True)


def encoder_decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS["t5"]()


def valued() -> torch.nn.Module:
    return with_value_head(language_model())


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**WIDTHS, **SMALL}, num_labels=1))


def pairs() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})


def labelled() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "completion": GOOD, "label": [i % 3 > 0 for i in range(12)]})


def brief(completions: list[str], log_metric: Callable, **_: object) -> list[float]:
    """Fewer characters are better. The first process logs a metric that others know nothing of."""
    if RANK == 0:
        log_metric("seen", 1.0)
    return [-len(set(completion)) / 4 for completion in completions]


ONLINE = {"reward_funcs": brief, "engine": Scripted(), "train_dataset": Dataset.from_dict({"prompt": PROMPTS})}
PAIRS = {"num_generations": 2, "per_device_train_batch_size": 2 * BATCH // WORLD}
LOOP = {"batch_size": 2 * BATCH // WORLD, "per_device_train_batch_size": 2 * BATCH // WORLD}
REPLAYED = {"bf16": True, "use_cpu": True, "cuda_graphs": WORLD > 1}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2}
REINFORCE = ReinforcePlusPlus(beta=0.1, entropy_bonus=EntropyBonus(0.1, target=4.7, step=0.02))
CASES: dict[str, tuple] = {
    "sft": (
        SFTTrainer,
        tied,
        {"train_dataset": Dataset.from_dict({"text": TEXTS}), "eval_dataset": STREAM},
        {"max_tokens_per_micro_batch": 60},
    ),
    "reward": (RewardTrainer, classifier, {"train_dataset": pairs()}, {}),
    "dpo": (DPOTrainer, language_model, {"train_dataset": pairs()}, {"gradient_accumulation_steps": 2}),
    "kto": (
        KTOTrainer,
        language_model,
        {"train_dataset": labelled(), "eval_dataset": labelled().select(range(8))},  # the last two are of one process
        {"max_tokens_per_micro_batch": 100},
    ),
    "bco": (KTOTrainer, language_model, {"train_dataset": labelled()}, {"loss_type": "bco"}),
    "early": (DPOTrainer, language_model, {"train_dataset": pairs()}, {"precompute_ref_log_probs": True}),
    "uneven": (
        SFTTrainer,
        language_model,
        {"train_dataset": Dataset.from_dict({"text": TEXTS[:7]})},
        {"learning_rate": 0.0, "max_tokens_per_micro_batch": 30},
    ),
    "grpo": (GRPOTrainer, language_model, ONLINE, {**PAIRS, "beta": 0.1}),
    "bf16": (GRPOTrainer, language_model, ONLINE, {**PAIRS, "beta": 0.1, "bf16": True, "use_cpu": True}),
    "graphs": (
        SFTTrainer,
        tied,
        {"train_dataset": Dataset.from_dict({"text": TEXTS})},
        {"gradient_accumulation_steps": BATCH // WORLD, **REPLAYED},
    ),
    "graphs_critic": (
        PPOTrainer,
        language_model,
        {**ONLINE, "value_model": classifier()},
        {**LOOP, "ppo_epochs": 2, **REPLAYED},
    ),
    "few": (  # prompts: the second process evaluates two and then none, after one step
        GRPOTrainer,
        language_model,
        {"reward_funcs": brief, "train_dataset": Dataset.from_dict({"prompt": PROMPTS[:5]})},
        {
            **PAIRS,
            "per_device_eval_batch_size": 4 // WORLD,
            "max_steps": 1,
            "temperature": 0,
            "max_completion_length": 5,
        },
    ),
    "t5": (GRPOTrainer, encoder_decoder, ONLINE, {**PAIRS, "beta": 0.1}),
    "rloo": (RLOOTrainer, language_model, ONLINE, {**PAIRS, **SYNC}),
    "reinforce": (OnlineTrainer, language_model, {**ONLINE, "algorithm": REINFORCE}, PAIRS),
    "online_dpo": (OnlineDPOTrainer, language_model, ONLINE, {"num_generations": 3}),
    "ppo": (PPOTrainer, valued, ONLINE, {**LOOP, "ppo_epochs": 2, "whiten_rewards": True}),
    "critic": (
        PPOTrainer,
        language_model,
        {**ONLINE, "value_model": classifier()},
        {**LOOP, "ppo_epochs": 4, "early_stopping": True, "target_kl": 1e-4},
    ),
}
"""Trainer, model, its arguments, its options."""


def options(folder: Path, extra: dict) -> dict:
    """Options under which a step of one process and of two is the same step."""
    size = BATCH // WORLD // extra.get("gradient_accumulation_steps", 1)
    common = {
        "per_device_eval_batch_size": 6 // WORLD,
        "per_device_train_batch_size": size,
        "output_dir": str(folder / "run"),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "html_report": False,
        "disable_dropout": True,
    }
    return common | extra


def adapter(lora: bool) -> dict:
    return {"peft_config": LoraConfig(r=4, lora_dropout=0.0)} if lora else {}


@contextmanager
def replaying() -> Iterator[None]:
    """Within it, layers of several processes are replayed on CPUs as they would be on CUDA; those of one process run."""
    recorder = Recorder()
    instead = {
        "_is_on_cuda": lambda self: True,
        "_fuses": lambda self: False,
    }
    with (
        patch.multiple(BaseTrainer, **instead),
        patch("trl.models.layouts.has_varlen", lambda model: True),
        patch("trl.trainers.ppo.model.has_varlen", lambda model: True),
        patch("torch.cuda.is_bf16_supported", lambda **_: True),
        patch("trl.models.graphs.cuda_graph", recorder),
    ):
        yield
    assert (recorder.replays > STEPS) == (WORLD > 1)


def trained(folder: Path, name: str, lora: bool) -> dict:
    """Losses, metrics and samples of a case, and its model saved."""
    trainer_class, make_model, arguments, extra = CASES[name]
    model = make_model()
    args = trainer_class.config_class(**options(folder, extra))
    given = {"eval_dataset": arguments["train_dataset"], **arguments, **adapter(lora)}
    with replaying() if name.startswith("graphs") else nullcontext():
        trainer = trainer_class(args=args, model=model, tokenizer=make_tokenizer(), **given)
        trainer.train()
    trainer.save_model(str(folder / "model"))
    trainer.evaluate()
    return logged(trainer) | ({"sampled": sampled(trainer)} if isinstance(trainer, OnlineTrainer) else {})


def logged(trainer: BaseTrainer) -> dict:
    """Metrics of every step and of the evaluation, by name; none that time has a part in."""
    found: dict = {}
    for log in (log for log in trainer.state.log_history if "train_runtime" not in log):
        for name, value in log.items():
            if not name.endswith(("runtime", "_per_second", "step_time", "padding_share")):
                found.setdefault(name, []).append(value)
    return found


def sampled(trainer: OnlineTrainer) -> list[list[int]]:
    """Continuations by the trained model; the second process samples longer ones, in more forward passes."""
    engine = LocalEngine(trainer.model_wrapped, progress=False)
    prompts = [Prompt([5, 9, 7]), Prompt([8, 4, 6, 11])]
    params = SamplingParams(seed=1, max_new_tokens=6 + 10 * RANK, ignore_eos=True)
    return [list(rollout.ids) for (rollout,) in engine.generate(prompts, params)]


def stepped(folder: Path, name: str, lora: bool) -> dict:
    """`PPOTrainer.step`, on triplets of this process's own; in "shared", policy and reference have a layer in common."""
    model = valued()
    config = PPOTrainer.config_class(**options(folder, {**LOOP, "ppo_epochs": 2, "horizon": 50, "max_grad_norm": None}))
    shared = {"num_shared_layers": 1} if name == "shared" else {}
    trainer = PPOTrainer(config, model, tokenizer=make_tokenizer(), **shared, **adapter(lora))
    generator = torch.Generator().manual_seed(1)
    queries = [torch.randint(3, 99, (2 + i % 3,), generator=generator) for i in range(8)]
    responses = [torch.randint(3, 99, (1 + i,), generator=generator) for i in range(8)]
    scores = torch.randn(8, generator=generator).tolist()
    mine = slice(RANK * 8 // WORLD, (RANK + 1) * 8 // WORLD)
    stats = [trainer.step(queries[mine], responses[mine], scores[mine]) for _ in range(STEPS // 2)]
    trainer.save_model(str(folder / "model"))
    names = ("ppo/loss/total", "ppo/policy/approxkl", "ppo/mean_scores", "objective/kl", "objective/kl_coef")
    return {name: [float(found[name]) for found in stats] for name in names}


def main(folder: Path, cases: Sequence[str]) -> None:
    for case in cases:
        name, _, lora = case.partition("+")
        unset_hf_deepspeed_config()  # the last trainer's, which would shard what is made from a configuration
        found = (trained if name in CASES else stepped)(folder / case, name, bool(lora))
        if RANK == 0:
            (folder / f"{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
