"""The commands of `trl`: one row each. A training method is its trainer, its configuration and a sentence.

A row whose module is not there is not listed. References are `"module:name"`, loaded when they are used, so that reading
this file imports nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from trl.cli.fields import Option, aliases_in_source, merge_options, options_in_source
from trl.cli.parser import OptionParser
from trl.cli.source import locate

SCRIPT = "trl.data.sources:ScriptArguments"
MIXTURE = "trl.data.mixtures:DatasetMixtureConfig"
MODEL = "trl.models.config:ModelConfig"
REWARDS = "trl.cli.rewards:RewardArguments"
REQUIRED_REWARDS = "trl.cli.rewards:RequiredRewards"
PICTURE_REWARDS = "trl.cli.rewards:PictureRewards"
LAUNCH = "trl.cli.launch:LaunchArguments"


@dataclass(frozen=True)
class Method:
    """A training command.

    extra       dataclass with options beside those of dataset, model and trainer
    keywords    function that makes further keyword arguments of the trainer from that dataclass
    example     words of an example, for the help screen
    check       function `(run) -> exit status` that shows what the command would do
    """

    name: str
    trainer: str
    config: str
    summary: str
    example: str
    extra: str | None = None
    keywords: str | None = None
    check: str = "trl.cli.check:check"

    @property
    def argument_classes(self) -> tuple[str, ...]:
        """References of the dataclasses with this command's options; those that import nothing heavy first."""
        return (SCRIPT, MODEL, MIXTURE, LAUNCH, *([self.extra] if self.extra else []), self.config)

    def options(self, *more: str) -> list[Option]:
        """The command's options, and those of the dataclasses `more`."""
        return merge_options(*map(options_in_source, (*more, self.config, *self.argument_classes)))

    def parser(self, *more: str) -> OptionParser:
        aliases = [aliases_in_source(reference) for reference in self.argument_classes]
        return OptionParser(self.options(*more), {old: new for each in aliases for old, new in each.items()})


@dataclass(frozen=True)
class Tool:
    """A command that trains nothing: `run(words) -> exit status`.

    options     its options, for completion: a dataclass, or a function `() -> list[Option]`; empty where words complete it
    """

    name: str
    run: str
    summary: str
    options: str = ""

    def known_options(self) -> list[Option]:
        if not self.options:
            return []
        is_class = self.options.rpartition(":")[2][0].isupper()
        return options_in_source(self.options) if is_class else load(self.options)()


_MODEL_AND_DATA = "--model_name_or_path facebook/opt-125m --dataset_name"
_REWARDED = (
    "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl --reward_funcs rewards.py:short"
)
_DIFFUSION = "--model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name prompts.jsonl"
_PICTURES = {"keywords": "trl.cli.rewards:picture_reward_keywords", "check": "trl.cli.check_diffusion:check"}

METHODS = (
    Method(
        "sft",
        "trl.trainers.sft:SFTTrainer",
        "trl.trainers.sft:SFTConfig",
        "Fine-tune on texts, chats, or prompts with completions.",
        f"{_MODEL_AND_DATA} imdb --output_dir opt-sft-imdb",
    ),
    Method(
        "reward",
        "trl.trainers.reward:RewardTrainer",
        "trl.trainers.reward:RewardConfig",
        "Train a reward model on pairs of a chosen and a rejected answer.",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-reward",
    ),
    Method(
        "dpo",
        "trl.trainers.dpo:DPOTrainer",
        "trl.trainers.dpo:DPOConfig",
        "Align with pairs of a chosen and a rejected answer, without a reward model (arXiv:2305.18290 and its family).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-dpo",
    ),
    Method(
        "cpo",
        "trl.trainers.cpo:CPOTrainer",
        "trl.trainers.cpo:CPOConfig",
        "Align with pairs of a chosen and a rejected answer, without a reference model (arXiv:2401.08417).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-cpo",
    ),
    Method(
        "orpo",
        "trl.trainers.cpo:ORPOTrainer",
        "trl.trainers.cpo:ORPOConfig",
        "Fine-tune and align with pairs in one go: the odds ratio beside the likelihood (arXiv:2403.07691).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-orpo",
    ),
    Method(
        "kto",
        "trl.trainers.kto:KTOTrainer",
        "trl.trainers.kto:KTOConfig",
        "Align with answers that are each labelled good or bad (arXiv:2402.01306).",
        f"{_MODEL_AND_DATA} trl-lib/kto-mix-14k --output_dir opt-kto",
    ),
    Method(
        "ilql",
        "trl.trainers.ilql:ILQLTrainer",
        "trl.trainers.ilql:ILQLConfig",
        "Offline reinforcement learning from answers with a reward each: Q-values that guide samples (arXiv:2206.11871).",
        "--model_name_or_path gpt2 --dataset_name rewarded.jsonl --output_dir gpt2-ilql",
        extra=REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "rft",
        "trl.trainers.rft:RFTTrainer",
        "trl.trainers.rft:RFTConfig",
        "Imitate the best of the model's own answers, by a bar that rises (arXiv:2308.08998, 2304.06767).",
        f"{_REWARDED} --output_dir qwen-rft",
        extra=REQUIRED_REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "ppo",
        "trl.trainers.ppo.trainer:PPOTrainer",
        "trl.trainers.ppo.trainer:PPOConfig",
        "Reinforcement learning with a value head and a KL penalty (arXiv:1909.08593).",
        f"{_REWARDED} --output_dir qwen-ppo",
        extra=REQUIRED_REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "grpo",
        "trl.trainers.grpo:GRPOTrainer",
        "trl.trainers.grpo:GRPOConfig",
        "Reinforcement learning from the rewards of a group of answers (arXiv:2402.03300 and its family).",
        f"{_REWARDED} --output_dir qwen-grpo",
        extra=REQUIRED_REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "rloo",
        "trl.trainers.rloo:RLOOTrainer",
        "trl.trainers.rloo:RLOOConfig",
        "REINFORCE with the other answers of a group as baseline (arXiv:2402.14740).",
        f"{_REWARDED} --output_dir qwen-rloo",
        extra=REQUIRED_REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "online-dpo",
        "trl.trainers.online_dpo:OnlineDPOTrainer",
        "trl.trainers.online_dpo:OnlineDPOConfig",
        "DPO on pairs that the model samples and a reward or judge ranks (arXiv:2402.04792).",
        f"{_REWARDED} --output_dir qwen-online-dpo",
        extra=REQUIRED_REWARDS,
        keywords="trl.cli.rewards:reward_keywords",
    ),
    Method(
        "ddpo",
        "trl.trainers.diffusion.batch_ddpo:DiffusionDDPOTrainer",
        "trl.trainers.diffusion.batch_ddpo:DiffusionDDPOConfig",
        "Diffusion models: reinforcement learning on denoising steps, rewards compared over the batch (arXiv:2305.13301).",
        f"{_DIFFUSION} --reward_funcs jpeg_compressibility_reward --use_peft --output_dir sd-ddpo",
        extra=PICTURE_REWARDS,
        **_PICTURES,
    ),
    Method(
        "diffusion-grpo",
        "trl.trainers.diffusion.grpo:DiffusionGRPOTrainer",
        "trl.trainers.diffusion.grpo:DiffusionGRPOConfig",
        "Diffusion models: rewards compared within groups of pictures, Flow-GRPO for flow matching (arXiv:2505.05470).",
        "--model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name prompts.jsonl --reward_funcs "
        "get_clip_reward --use_peft --output_dir sd3-grpo",
        extra=PICTURE_REWARDS,
        **_PICTURES,
    ),
    Method(
        "diffusion-nft",
        "trl.trainers.diffusion.nft:DiffusionNFTTrainer",
        "trl.trainers.diffusion.nft:DiffusionNFTConfig",
        "Diffusion models: reinforcement learning on noised pictures, without likelihoods (arXiv:2509.16117).",
        "--model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name prompts.jsonl --reward_funcs "
        "get_clip_reward --use_peft --output_dir sd3-nft",
        extra=PICTURE_REWARDS,
        **_PICTURES,
    ),
    Method(
        "diffusion-dpo",
        "trl.trainers.diffusion.dpo:DiffusionDPOTrainer",
        "trl.trainers.diffusion.dpo:DiffusionDPOConfig",
        "Diffusion models: align with pairs of a chosen and a rejected picture (arXiv:2311.12908).",
        "--model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name pairs --output_dir sd-dpo",
        check="trl.cli.check_diffusion:check",
    ),
)

TOOLS = (
    Tool("preview", "trl.cli.preview:run", "Show rows as the model sees them: what is trained on, and what is not."),
    Tool("chat", "trl.cli.chat.command:run", "Talk to a model in the terminal.", "trl.cli.chat.command:options"),
    Tool(
        "eval",
        "trl.cli.evaluation.command:run",
        "Samples, rewards and perplexity; how often a model wins against another.",
        "trl.cli.evaluation.command:options",
    ),
    Tool(
        "label",
        "trl.cli.label.command:run",
        "People rate, compare or correct completions on a local web page.",
        "trl.cli.label.command:options",
    ),
    Tool("merge", "trl.cli.merge:run", "Make one model of an adapter and its base.", "trl.cli.merge:options"),
    Tool(
        "serve",
        "trl.cli.serve.command:run",
        "Serve a model: to trainers, to `trl chat`, to any OpenAI client.",
        "trl.cli.serve.command:options",
    ),
    Tool(
        "vllm-serve",
        "trl.cli.vllm_serve:run",
        "Start vLLM's own server with the flags that trainers need.",
        "trl.cli.vllm_serve:VLLMServeArguments",
    ),
    Tool(
        "report",
        "trl.cli.report:run",
        "A page of a run: curves, samples, configuration; opens in any browser.",
        "trl.cli.report:ReportArguments",
    ),
    Tool(
        "sweep",
        "trl.cli.sweep:run",
        "Run a script with many settings, on Ray Tune or one after the other, and compare.",
        "trl.cli.sweep:SweepArguments",
    ),
    Tool("check", "trl.cli.check:run", "Show what a training command would do: rows, plan, memory, rewards."),
    Tool(
        "demo",
        "trl.cli.demo:run",
        "Fine-tuning, a reward model and PPO on film reviews that come along.",
        "trl.demo.options:DemoArguments",
    ),
    Tool("env", "trl.cli.environment:run", "Versions and hardware, for bug reports."),
    Tool("completion", "trl.cli.completion:run", "Completion of commands and options in bash, zsh or fish."),
)


def methods() -> dict[str, Method]:
    """The training commands that this version has."""
    return {each.name: each for each in METHODS if _is_there(each.trainer)}


def tools() -> dict[str, Tool]:
    """The other commands that this version has."""
    return {each.name: each for each in TOOLS if _is_there(each.run)}


def _is_there(reference: str) -> bool:
    return locate(reference.partition(":")[0]) is not None


def load(reference: str) -> Any:
    """What `"module:name"` stands for, imported."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
