"""What scripts for other releases of TRL import: old paths lead to `trl`, and names without a counterpart say so.

from trl.trainer.utils import DataCollatorForCompletionOnlyLM       # found: the path leads to `trl`
from trl.experimental.cpo import CPOTrainer                         # found
from trl import BestOfNSampler                                      # ImportError: … what to do
class Mine(DPOTrainer): def dpo_loss(…)                             # ConfigError: never called; what to do
class Mine(DPOTrainer): def _get_num_items_in_batch(…)              # ConfigError, too: a method of `transformers.Trainer`
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trl.errors import ConfigError, suggest

PATHS = (
    "trl.chat_template_utils",
    "trl.commands",
    "trl.data_utils",
    "trl.distributed",
    "trl.env_utils",
    "trl.environment",
    "trl.environment.base_environment",
    "trl.experimental",
    "trl.extras",
    "trl.extras.best_of_n_sampler",
    "trl.extras.dataset_formatting",
    "trl.generation",
    "trl.import_utils",
    "trl.kernels",
    "trl.mergekit_utils",
    "trl.models.activation_offloading",
    "trl.models.auxiliary_modules",
    "trl.models.modeling_base",
    "trl.models.modeling_sd_base",
    "trl.models.modeling_value_head",
    "trl.models.sd_utils",
    "trl.models.selective_activation_checkpointing",
    "trl.models.utils",
    "trl.rewards.accuracy_rewards",
    "trl.rewards.format_rewards",
    "trl.rewards.other_rewards",
    "trl.scripts",
    "trl.trainer",
    "trl.utils",
)
"""Packages of other releases. A name imported from one of them, or from below, is that name of `trl`."""

MODULES = ("_config", "_trainer", "_utils", "callbacks", "cli", "core", "judges", "utils", "profiling", "vllm_client")
"""How names of modules in them end: `from trl.trainer import ppo_trainer` is a module, all other names are of `trl`."""

METHODS = ("trl.experimental", "trl.scripts")
"""Packages in which every name is one of a module: of a method, that is."""

OBJECTIVE = "an algorithm of your own is a class with `advantages` and `loss`: see examples/own_algorithm.py."
PADDING = "trainers pad and mask by themselves: leave `data_collator` out."
REPORT = "completions go to `log_completions`, and every run writes a report with samples: see `trl report`."
BY_REWARD = "`OnlineDPOTrainer` chooses pairs by reward functions; a judge is one that returns 1 and 0."
LOSS = "Override `loss(model, batch) -> (loss, metrics)`."
METRICS = "Return them from `loss`, or override `log(logs, start_time)`."
ROWS = "Change the rows of the dataset, or override `encode(rows, split, name)`."
SAMPLES = "Give an `engine`: see `trl.rollouts.engine`."
SCORES = "Log-probabilities come from `score(model, batch)`: override `loss(model, batch) -> (loss, metrics)`."
SIX_LINES = "it is a `transformers.TrainerCallback` of a few lines; `SyncRefModelCallback` is here."

SWEEP = "`trl sweep` looks for hyperparameters, with a model made anew for each trial: see docs/coming_from_trl.md."
TOOLS = "tools are not called yet; an `engine` of your own can be given to every online trainer."

_TOGETHER = {
    OBJECTIVE: (
        "A2POTrainer AsyncDistillationTrainer DPPOTrainer DistillationTrainer GFPOTrainer GKDTrainer GOLDTrainer "
        "GRPOWithReplayBufferTrainer IWOPDTrainer MiniLLMTrainer PAPOTrainer SDFTTrainer SDPOTrainer SSDTrainer "
        "ServerDistillationTrainer TPOTrainer"
    ),
    BY_REWARD: (
        "AllTrueJudge BaseJudge BasePairwiseJudge BaseRankJudge HfPairwiseJudge OpenAIPairwiseJudge PairRMJudge "
        "RandomPairwiseJudge RandomRankJudge"
    ),
    SIX_LINES: "BEMACallback MergeModelCallback",
    "look for the package itself: `importlib.util.find_spec`.": (
        "is_bitsandbytes_available is_deepspeed_available is_diffusers_available is_liger_kernel_available "
        "is_mergekit_available is_peft_available is_rich_available is_unsloth_available is_vllm_available is_wandb_available"
    ),
    "`setup_chat_format` gives a tokenizer a chat template, and `chat_template_path` takes one from a file.": (
        "SIMPLE_CHAT_TEMPLATE SIMPLE_SFT_CHAT_TEMPLATE"
    ),
    "give a `rollout_func`: see docs/scaling.md.": "generate_rollout_completions get_nemo_gym_rollout_func",
    PADDING: "DPODataCollatorWithPadding DataCollatorForPreference RewardDataCollatorWithPadding",
    "use `ScriptArguments`.": (
        "DPOScriptArguments GRPOScriptArguments KTOScriptArguments RLOOScriptArguments RewardScriptArguments "
        "SFTScriptArguments"
    ),
    REPORT: "LogCompletionsCallback WeaveCallback WinRateCallback",
    "use `OnlineDPOTrainer`.": "NashMDTrainer XPOTrainer",
    "tools are not called yet; `PPOTrainer.step` learns from what your own loop produced.": (
        "TextEnvironment TextHistory"
    ),
    "tools are not called yet.": "add_response_schema supports_tool_calling",
}
REMOVED = {name: advice for advice, names in _TOGETHER.items() for name in names.split()}
REMOVED |= {
    "AsyncGRPOTrainer": "use `GRPOTrainer`: an `engine` of your own may sample in other processes.",
    "BestOfNSampler": "sample with `LocalEngine` and `n=…`, and keep the best of each group.",
    "ConstantLengthDataset": "use `SFTConfig(packing=True)`, or `pack_dataset`.",
    "DDPOStableDiffusionPipeline": "it is a base class: use `DefaultDDPOStableDiffusionPipeline`.",
    "DataCollatorForChatML": "`SFTTrainer` takes `messages` as they are, and `assistant_only_loss=True`.",
    "DataCollatorForLanguageModeling": "import it from `transformers`; without a `data_collator`, trainers lay rows out by themselves.",
    "FDivergenceConstants": "give `f_divergence_type` and `f_alpha_divergence_coef` of `DPOConfig`.",
    "FDivergenceType": "give `f_divergence_type` of `DPOConfig` as a str.",
    "GMPOTrainer": 'use `GRPOTrainer` with `GRPOConfig(loss_type="gmpo")`, and `epsilon=0.4`, as its paper has.',
    "IterativeSFTTrainer": "train an `SFTTrainer` on each round's rows.",
    "PPOv2Trainer": "use `PPOTrainer`: it has the whole loop, `train()`.",
    "PRMTrainer": "use `RewardTrainer` with rows of `prompt`, `completions`, `labels`.",
    "PreTrainedModelWrapper": "it is a base class: use `AutoModelForCausalLMWithValueHead`.",
    "VLLMClient": "set `use_vllm=True` of the configuration: see docs/scaling.md.",
    "compute_accuracy": "`RewardTrainer` logs `accuracy` by itself.",
    "disable_dropout_in_model": "set `disable_dropout=True` of the configuration.",
    "generate_model_card": "every trainer writes one: `trainer.create_model_card()`.",
    "get_training_chat_template": "`assistant_only_loss=True` works with any template: none has to be patched.",
    "init_zero_verbose": "set the level of Python's `logging`.",
    "is_npu_available": "import it from `transformers.utils`.",
    "is_xpu_available": "import it from `accelerate.utils`.",
    "peft_module_casting_to_bf16": "set `bf16=True` of the configuration: weights stay as they are loaded.",
    "prepare_multimodal_messages": "rows with images are read as they are: see docs/vision.md.",
    "truncate_dataset": "set `max_length` of the configuration: what was cut is counted and said.",
    "unwrap_model_for_generation": "trainers gather weights for sampling by themselves; else call `trainer.accelerator.unwrap_model(model)`.",
}
REMOVED |= {name.replace("Trainer", "Config"): advice for name, advice in REMOVED.items() if name.endswith("Trainer")}
"""Names that other releases have, and what to do without each."""


_NO_LOGITS = (
    "logits of all tokens never exist here, but for `compute_metrics` of `SFTTrainer`; trainers of preferences and rewards give "
    "it rewards. "
    f"{LOSS} Metrics are averaged over the set and logged."
)
ARGUMENTS = dict.fromkeys(("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"), _NO_LOGITS)
ARGUMENTS |= {
    "environment_factory": TOOLS,
    "judge": BY_REWARD,
    "model_init": f"give the model itself, or its name. {SWEEP}",
    "policy": "it is `model`.",
    "ref_policy": "the reference is the model as it is given.",
    "reward_model": "it is one of `reward_funcs`.",
    "tools": TOOLS,
}
"""Arguments of trainers elsewhere, and what to do without each."""

OPTIONS = {
    "generate_during_eval": REPORT,
    "local_rollout_forward_batch_size": "`max_tokens_per_micro_batch` bounds a forward pass.",
    "max_completion_length": "`max_length` bounds prompt and completion together, and `max_prompt_length` the prompt.",
    "max_target_length": "`max_length` bounds prompt and completion each, with an encoder-decoder.",
    "num_mini_batches": "`batch_size` is a batch, `mini_batch_size` a part of it.",
    "num_sample_generations": REPORT,
    "reward_model_path": "give the trainer `reward_funcs`: names of models are among them.",
    "sft_model_path": "give the trainer `model`: the reference is that model as it is given.",
    "stop_token": "responses end with the model's end-of-sequence tokens; `generation_kwargs` may name others.",
    "total_episodes": "set `max_steps` or `num_train_epochs`.",
}
"""Options of configurations elsewhere, and what to do without each."""

_HOOKS = {
    LOSS: (
        "_compute_loss _compute_loss_liger bco_loss compute_liger_loss cpo_loss dpo_loss get_batch_loss_metrics "
        "get_high_entropy_mask get_off_policy_mask kto_loss odds_ratio_loss train_minibatch"
    ),
    METRICS: "_log_completion_extra _log_metric record_step_stats store_metrics",
    f"{OBJECTIVE[0].upper()}{OBJECTIVE[1:]}": "_kl_penalty compute_rewards",
    SAMPLES: "_generate _generate_single_turn _tool_call_loop generate_from_model",
    SCORES: (
        "_compute_kl_logps _get_per_token_logps _get_per_token_logps_and_entropies batched_forward_pass "
        "compute_ref_log_probs compute_reference_log_probs concatenated_forward get_batch_logps"
    ),
    ROWS: "_prepare_dataset _tokenize_prompts build_tokenized_answer concatenated_inputs process_row tokenize_row",
}
HOOKS = {name: advice for advice, names in _HOOKS.items() for name in names.split()}
HOOKS |= {
    "_calculate_rewards": "Give `reward_funcs`.",
    "_generate_and_score_completions": f"{SAMPLES} Advantages are computed by an algorithm: see examples/own_algorithm.py.",
    "_get_num_items_in_batch": "What a loss weighs comes from `weights(batch)`: override that.",
    "_prepare_input": "What a batch holds is made by `collate(items)`: override that.",
    "_set_signature_columns_if_needed": ROWS,
    "_tune_save_checkpoint": f"{SWEEP[0].upper()}{SWEEP[1:]}",
    "call_model_init": f"{SWEEP[0].upper()}{SWEEP[1:]}",
    "create_optimizer_and_scheduler": "Override `create_optimizer` or `create_scheduler`, or give `optimizers`.",
}
"""Methods that trainers of other releases, or `transformers.Trainer`, call and those of this one do not, and what to override or
give instead. What a trainer leaves out besides is in its `uncalled`."""
SAMPLER = {
    "_get_train_sampler": (
        "Prompts are taken in a random order, or as they come with shuffle_dataset=False: order the rows of the dataset."
    )
}
"""As `HOOKS`, of trainers that sample what they learn from."""


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an option or argument elsewhere was given the value that leaves it off."""
    return name in ARGUMENTS | OPTIONS and (value is None or (isinstance(value, int) and not value))


def remedy(name: str, known: Iterable[str]) -> str:
    """What to do without an option or argument, as the end of an error; for others, which of the `known` are near."""
    if name not in (remedies := ARGUMENTS | OPTIONS):
        return suggest(name, known)
    return f" {remedies[name][0].upper()}{remedies[name][1:]}"


def reject_unused_overrides(cls: type, hooks: Mapping[str, str]) -> None:
    """Raises ConfigError for a trainer with a method of its own that nothing would call: one of `HOOKS` or `hooks`."""
    for name, advice in sorted((HOOKS | {**hooks}).items()):
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is not None and not owner.__module__.startswith(("transformers.", "trl.")):
            raise ConfigError(f"{cls.__name__}.{name} would never be called by this release of TRL. {advice}")


class LegacyImportFinder(MetaPathFinder, Loader):
    """Finds the modules of `PATHS`, which have no files: their names are those of `trl`.

    `from package import name` asks for a module where the package has no such attribute, so a name that is not there gets
    its words here; `hasattr` does not ask, and is False.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if fullname in PATHS or (_is_old(parent) and (parent in METHODS or name.endswith(MODULES))):
            return ModuleSpec(fullname, self, is_package=True)
        if name.startswith("__") or not (_is_old(parent) or (parent in NEW and name in REMOVED)):
            return None
        raise ImportError(_not_here(parent, name), name=fullname)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "An import path of other releases. See `trl`."
        module.__dict__["__getattr__"] = names_for(module.__name__)


NEW = ("trl", "trl.models")
"""Packages that are here, and in which names of other releases are looked for."""


def _is_old(module: str) -> bool:
    """Whether all that is looked for in a module is looked for by scripts of other releases."""
    return any(module == old or module.startswith(f"{old}.") for old in (*PATHS, "trl.core"))


def _not_here(path: str, name: str) -> str:
    """What to do without a name of another release."""
    if name in REMOVED:
        return f"trl.{name} is of another release of TRL and not in this one: {REMOVED[name]}"
    known = importlib.import_module("trl").__all__
    if not _is_old(path):
        return f"module {path!r} has no attribute {name!r}.{suggest(name, known)}"
    return (
        f"{path} is a path of other releases of TRL, and nothing here is called {name!r}.{suggest(name, known)} See "
        "docs/coming_from_trl.md."
    )


def missing(path: str, name: str) -> AttributeError:
    """The error of a module's `__getattr__` for a name that is not there."""
    return AttributeError(_not_here(path, name), name=name)


def names_for(path: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that finds names in `trl`."""

    def find(name: str) -> Any:
        trl = importlib.import_module("trl")
        if name.startswith("__") or name not in trl.__all__:
            raise missing(path, name)
        return getattr(trl, name)

    return find
