"""The table of `trl` commands: training methods (a trainer and a summary) and tools (a function and its options).

Classes and functions are referred to as `"module:name"` and imported only when used, so that `trl --help` stays fast.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trl.cli.fields import Option, aliases_in_source, merge_options, options_in_source
from trl.cli.parser import OptionParser, ParsedOptions
from trl.errors import ConfigError, unknown

SCRIPT = "trl.data.sources:ScriptArguments"
MIXTURE = "trl.data.mixtures:DatasetMixtureConfig"
MODEL = "trl.models.config:ModelConfig"
REWARDS = "trl.cli.rewards:RewardArguments"
REQUIRED_REWARDS = "trl.cli.rewards:RequiredRewards"
PICTURE_REWARDS = "trl.cli.rewards:PictureRewards"
LAUNCH = "trl.cli.launch:LaunchArguments"
CHECK_PICTURES = "trl.cli.check_diffusion:check"


def load(reference: str) -> Any:
    """Import and return the object that `"module:name"` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """A training command.

    trainer     class of the trainer; its configuration is in the same module, as SFTConfig is for SFTTrainer
    example     example arguments for the help screen
    extra       dataclass with further options (of rewards, for instance); its `keywords` are passed to the trainer
    check       function `(run) -> exit status` that implements `trl check` for this method
    unread      prefixes of options that are errors with this method, so that the help leaves them out
    """

    name: str
    trainer: str
    summary: str
    example: str
    extra: str | None = None
    check: str = "trl.cli.check:check"
    unread: tuple[str, ...] = ()

    @property
    def config(self) -> str:
        return f"{self.trainer.removesuffix('Trainer')}Config"

    @property
    def argument_classes(self) -> tuple[str, ...]:
        """References of the dataclasses with this command's options; those that import nothing heavy first."""
        return (SCRIPT, MODEL, MIXTURE, LAUNCH, *([self.extra] if self.extra else []), self.config)

    def options(self, *more: str) -> list[Option]:
        """The command's options, and those of the dataclasses `more`."""
        return merge_options(*map(options_in_source, (*more, self.config, *self.argument_classes)))

    def shown(self, *more: str) -> list[Option]:
        """The options that the help shows."""
        return [option for option in self.options(*more) if not option.name.startswith(self.unread)]

    def parser(self, *more: str) -> OptionParser:
        return OptionParser(self.options(*more), aliases_of_all(self.argument_classes))


def aliases_of_all(references: Sequence[str]) -> dict[str, str]:
    """Map old names of options to current ones, for several dataclasses."""
    return {old: new for each in references for old, new in aliases_in_source(each).items()}


QUANTISED = ("load_in_", "bnb_", "use_bnb_")
"""Prefixes of the model options for quantised weights."""
_OF_LANGUAGE = """
    attn_implementation adapter_name_or_path reward_model_name_or_path chat_template_path pad_token eos_token
    dataset_num_proc max_tokens_per_micro_batch trust_remote_code disable_dropout layout pad_to_multiple_of max_pixels
    min_pixels image_features_mb adapted_part activation_offloading cuda_graphs router_aux_loss_coef fsdp deepspeed
"""
OF_LANGUAGE = (*QUANTISED, *_OF_LANGUAGE.split())
"""Prefixes of the options that trainers of diffusion models refuse."""

TRAINED = ("use_peft", "lora_", "use_rslora", "use_dora")
"""Prefixes of the model options that only training uses."""


@dataclass(frozen=True)
class Tool:
    """A command that trains nothing.

    run         function `(arguments, given) -> exit status`, where `arguments` is an instance of `options[0]` and
                `given` all parsed options; a tool without options gets the list of command-line words instead
    options     dataclasses with its options, its own first
    examples    example arguments for the help screen
    usage       positional arguments, as the help screen shows them
    operands    maximum number of positional arguments
    unread      prefixes of the model options that it does not use
    hands_on    whether it passes unknown options on to another program instead of refusing them
    method      for a tool that takes a training command (`trl check dpo`): that command, or the default one
    """

    name: str
    run: str
    summary: str
    options: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    usage: str = ""
    operands: float = 0
    unread: tuple[str, ...] = TRAINED
    hands_on: bool = False
    method: Method | None = None

    def known_options(self) -> list[Option]:
        if self.method is not None:
            return self.method.options(*self.options)
        found = merge_options(*map(options_in_source, self.options))
        if MODEL not in self.options:
            return found
        # By default, a model that is not trained is loaded in the precision in which it was saved.
        kept = [option for option in found if not option.name.startswith(self.unread)]
        return [replace(option, default="auto") if option.name == "dtype" else option for option in kept]

    def about(self, words: Sequence[str]) -> tuple[Tool, Sequence[str]]:
        """The tool for the training command that the first word names, and the remaining words."""
        if self.method is None or not words or words[0].startswith("-"):
            return self, words
        if words[0] not in (known := methods()):
            raise ConfigError(unknown("method", words[0], known))
        return replace(self, method=known[words[0]]), words[1:]

    def read(self, words: Sequence[str]) -> ParsedOptions:
        """Parse the words of the command line. Raises ConfigError."""
        references = (*self.options, *(self.method.argument_classes if self.method else ()))
        parser = OptionParser(self.known_options(), aliases_of_all(references))
        given = parser.parse(words, keep_words=self.operands > 0, keep_rest=self.hands_on)
        if not self.hands_on and len(given.rest) > self.operands:
            raise ConfigError(f"Unexpected {given.rest[-1]!r}. Usage: trl {self.name} {self.usage}")
        return given

    def start(self, words: Sequence[str]) -> int:
        """Run the command. Returns the exit status."""
        if not self.options:
            return load(self.run)(words)
        tool, words = self.about(words)
        given = tool.read(words)
        if given.help:
            return tool.print_help(everything=given.help == "all")
        os.environ.update(given.environment)
        arguments = given.arguments_for(load(self.options[0]))
        return load(self.run)(arguments, given, *([tool.method] if tool.method else []))

    def print_help(self, *, everything: bool) -> int:
        from trl.cli.help import print_options

        name = " ".join(["trl", self.name, *([self.method.name] if self.method else [])])
        examples = [f"{self.method.example} --rows 5"] if self.method else self.examples
        usage = f"{name} {self.usage}".rstrip()
        shown = [f"{name} {example}".rstrip() for example in examples]
        options = self.method.shown(*self.options) if self.method else self.known_options()
        print_options(usage, self.summary, options, everything=everything, examples=shown)
        return 0


_MODEL_AND_DATA = "--model_name_or_path facebook/opt-125m --dataset_name"
_REWARDED = (
    "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl --reward_funcs rewards.py:short"
)
_DIFFUSION = "--model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name prompts.jsonl"
_of_pictures = partial(Method, check=CHECK_PICTURES, unread=OF_LANGUAGE)

METHODS = (
    Method(
        "sft",
        "trl.trainers.sft:SFTTrainer",
        "Fine-tune on texts, chats, or prompts with completions.",
        f"{_MODEL_AND_DATA} imdb --output_dir opt-sft-imdb",
    ),
    Method(
        "reward",
        "trl.trainers.reward:RewardTrainer",
        "Train a reward model on pairs of a chosen and a rejected answer.",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-reward",
    ),
    Method(
        "dpo",
        "trl.trainers.dpo:DPOTrainer",
        "Align with pairs of a chosen and a rejected answer, without a reward model (arXiv:2305.18290 and its family).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-dpo",
    ),
    Method(
        "cpo",
        "trl.trainers.cpo:CPOTrainer",
        "Align with pairs of a chosen and a rejected answer, without a reference model (arXiv:2401.08417).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-cpo",
    ),
    Method(
        "orpo",
        "trl.trainers.cpo:ORPOTrainer",
        "Fine-tune and align on pairs in one stage: likelihood plus an odds-ratio penalty (arXiv:2403.07691).",
        f"{_MODEL_AND_DATA} trl-lib/ultrafeedback_binarized --output_dir opt-orpo",
    ),
    Method(
        "kto",
        "trl.trainers.kto:KTOTrainer",
        "Align with answers that are each labelled good or bad (arXiv:2402.01306).",
        f"{_MODEL_AND_DATA} trl-lib/kto-mix-14k --output_dir opt-kto",
    ),
    Method(
        "ilql",
        "trl.trainers.ilql:ILQLTrainer",
        "Offline reinforcement learning from answers with rewards: Q-values steer sampling (arXiv:2206.11871).",
        "--model_name_or_path gpt2 --dataset_name rewarded.jsonl --output_dir gpt2-ilql",
        extra=REWARDS,
    ),
    Method(
        "rft",
        "trl.trainers.rft:RFTTrainer",
        "Fine-tune on the model's own best answers, with a rising reward threshold (arXiv:2308.08998, 2304.06767).",
        f"{_REWARDED} --output_dir qwen-rft",
        extra=REQUIRED_REWARDS,
    ),
    Method(
        "ppo",
        "trl.trainers.ppo.trainer:PPOTrainer",
        "Reinforcement learning with a value head and a KL penalty (arXiv:1909.08593).",
        f"{_REWARDED} --output_dir qwen-ppo",
        extra=REQUIRED_REWARDS,
    ),
    Method(
        "grpo",
        "trl.trainers.grpo:GRPOTrainer",
        "Reinforcement learning on rewards compared within groups of answers (arXiv:2402.03300 and its family).",
        f"{_REWARDED} --output_dir qwen-grpo",
        extra=REQUIRED_REWARDS,
    ),
    Method(
        "rloo",
        "trl.trainers.rloo:RLOOTrainer",
        "REINFORCE with the other answers of a group as baseline (arXiv:2402.14740).",
        f"{_REWARDED} --output_dir qwen-rloo",
        extra=REQUIRED_REWARDS,
    ),
    Method(
        "online-dpo",
        "trl.trainers.online_dpo:OnlineDPOTrainer",
        "DPO on pairs that the model samples and a reward or judge ranks (arXiv:2402.04792).",
        f"{_REWARDED} --output_dir qwen-online-dpo",
        extra=REQUIRED_REWARDS,
    ),
    _of_pictures(
        "ddpo",
        "trl.trainers.diffusion.batch_ddpo:DiffusionDDPOTrainer",
        "Diffusion models: reinforcement learning on denoising steps, rewards compared over the batch (arXiv:2305.13301).",
        f"{_DIFFUSION} --reward_funcs jpeg_compressibility_reward --use_peft --output_dir sd-ddpo",
        extra=PICTURE_REWARDS,
    ),
    _of_pictures(
        "diffusion-grpo",
        "trl.trainers.diffusion.grpo:DiffusionGRPOTrainer",
        "Diffusion models: rewards compared within groups of pictures, Flow-GRPO for flow matching (arXiv:2505.05470).",
        "--model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name prompts.jsonl --reward_funcs "
        "get_clip_reward --use_peft --output_dir sd3-grpo",
        extra=PICTURE_REWARDS,
    ),
    _of_pictures(
        "diffusion-nft",
        "trl.trainers.diffusion.nft:DiffusionNFTTrainer",
        "Diffusion models: reinforcement learning on noised pictures, without likelihoods (arXiv:2509.16117).",
        "--model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name prompts.jsonl --reward_funcs "
        "get_clip_reward --use_peft --output_dir sd3-nft",
        extra=PICTURE_REWARDS,
    ),
    _of_pictures(
        "diffusion-dpo",
        "trl.trainers.diffusion.dpo:DiffusionDPOTrainer",
        "Diffusion models: align with pairs of a chosen and a rejected picture (arXiv:2311.12908).",
        "--model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name pairs --output_dir sd-dpo",
    ),
)

TOOLS = (
    Tool(
        "check",
        "trl.cli.check:run",
        "Show what a training command would do: rows, plan, memory, rewards.",
        options=("trl.cli.check:CheckArguments",),
        method=METHODS[0],
    ),
    Tool(
        "preview",
        "trl.cli.preview:run",
        "Show rows as the model sees them: which tokens are trained on, and which are masked.",
        options=("trl.cli.preview:PreviewArguments",),
        method=METHODS[0],
    ),
    Tool(
        "chat",
        "trl.cli.chat.command:run",
        "Talk to a model in the terminal.",
        options=("trl.cli.chat.arguments:ChatArguments", MODEL),
        examples=(
            "--model_name_or_path Qwen/Qwen1.5-0.5B-Chat",
            '--model_name_or_path opt-sft-imdb --system_prompt "Be brief." --temperature 0.7',
            "--server http://localhost:8000",
        ),
    ),
    Tool(
        "eval",
        "trl.cli.evaluation.command:run",
        "Measure a model: rewards of its answers, perplexity, benchmarks, or how often it wins against another model.",
        options=("trl.cli.evaluation.arguments:EvalArguments", MODEL),
        examples=(
            "--model_name_or_path qwen-sft --dataset_name prompts.jsonl --reward_funcs rewards.py:short",
            "--model_name_or_path qwen-dpo --against qwen-sft --dataset_name prompts.jsonl --reward_funcs ./qwen-reward",
            "--model_name_or_path qwen-sft --dataset_name chats.jsonl --perplexity",
            "--model_name_or_path qwen-sft --benchmarks gsm8k ifeval --chat",
            "--model_name_or_path qwen-vl-dpo --dataset_name questions.jsonl --pope",
        ),
    ),
    Tool(
        "merge",
        "trl.cli.merge:run",
        "Merge an adapter into its base model, and save it with the tokenizer and any value head.",
        options=("trl.cli.merge:MergeArguments", MODEL),
        examples=(
            "--model_name_or_path qwen-sft --output_dir qwen-sft-merged",
            "--model_name_or_path Qwen/Qwen2.5-0.5B --adapter_name_or_path me/qwen-sft --output_dir merged --dtype bfloat16",
        ),
        unread=(*TRAINED, "attn_implementation", *QUANTISED),
    ),
    Tool(
        "report",
        "trl.cli.report:run",
        "Write an HTML page about a run, or several: curves, samples, settings.",
        options=("trl.cli.report:ReportArguments",),
        examples=("opt-sft-imdb", "opt-sft-imdb --watch", "beta-0.1 beta-0.5 --output betas.html"),
        usage="RUN [RUN …]",
        operands=math.inf,
    ),
    Tool(
        "label",
        "trl.cli.label.command:run",
        "Rate, compare or correct completions on a local web page, and save them as a dataset.",
        options=("trl.cli.label.arguments:LabelArguments", MODEL),
        examples=(
            "completions.jsonl --task rate --output ratings.jsonl",
            "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl --task compare --output "
            "pairs.jsonl",
            "--output ratings.jsonl --export_to tasks.json --export_format label_studio",
        ),
        usage="[FILE]",
        operands=1,
    ),
    Tool(
        "serve",
        "trl.cli.serve.command:run",
        "Serve a model to trainers, to `trl chat --server`, and to any client of the OpenAI API.",
        options=("trl.cli.serve.arguments:ServeArguments", MODEL),
        examples=("Qwen/Qwen2.5-0.5B-Instruct", "./my-model --port 8001 --served_model_name mine"),
        usage="MODEL",
        operands=1,
    ),
    Tool(
        "vllm-serve",
        "trl.cli.vllm_serve:run",
        "Start vLLM's server with the flags that trainers need; unknown options are passed to `vllm serve`.",
        options=("trl.cli.vllm_serve:VLLMServeArguments",),
        examples=("--model Qwen/Qwen2.5-0.5B-Instruct --port 8001",),
        hands_on=True,
    ),
    Tool(
        "sweep",
        "trl.cli.sweep:run",
        "Run a script's main(hparams) with many settings, on Ray Tune or one after another, and compare.",
        options=("trl.cli.sweep:SweepArguments",),
        examples=("rates.py --config sweep.yaml", "rates.py --config sweep.yaml --sequential"),
        usage="SCRIPT.py",
        operands=1,
    ),
    Tool(
        "demo",
        "trl.cli.demo:run",
        "Demonstrate fine-tuning, a reward model and PPO on film reviews that trl includes.",
        options=("trl.demo.options:DemoArguments",),
        examples=("", "--model_name_or_path gpt2 --reward_model_name_or_path lvwerra/distilbert-imdb"),
    ),
    Tool("env", "trl.cli.environment:run", "Print versions and hardware, for bug reports."),
    Tool(
        "completion",
        "trl.cli.completion:run",
        "Print the shell code that completes commands and options in bash, zsh or fish.",
    ),
)


def methods() -> dict[str, Method]:
    """The training commands by name."""
    return {each.name: each for each in METHODS}


def tools() -> dict[str, Tool]:
    """The other commands by name."""
    return {each.name: each for each in TOOLS}
