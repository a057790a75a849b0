"""Import paths and names of other releases of TRL."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trl.compat.advice import BY_REWARD, OBJECTIVE, PADDING, REPORT, SIX_LINES
from trl.errors import suggest

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
"""Modules of other releases that do not exist here. Names imported from them, or their submodules, come from `trl`."""

MODULES = ("_config", "_trainer", "_utils", "callbacks", "cli", "core", "judges", "utils", "profiling", "vllm_client")
"""Endings of submodule names: `from trl.trainer import ppo_trainer` gives a module, other names are looked up in `trl`."""

METHODS = ("trl.experimental", "trl.scripts")
"""Packages in which every name is a submodule, one per method."""

_CLASSIC = """
DPOScriptArguments DpoScriptArguments RewardFunc RewardScriptArguments SFTScriptArguments SIMPLE_CHAT_TEMPLATE
SIMPLE_SFT_CHAT_TEMPLATE SftScriptArguments aesthetic_scorer build_bert_batch_from_txt conversations_formatting_function
init_zero_verbose is_bitsandbytes_available is_deepspeed_available is_diffusers_available
is_liger_kernel_available is_mergekit_available is_npu_available is_peft_available is_rich_available
is_unsloth_available is_vllm_available is_wandb_available is_xpu_available strtobool
"""
CLASSIC = frozenset(_CLASSIC.split())
"""Names of `trl.classic`, which scripts of other releases import."""

_TOGETHER = {
    OBJECTIVE: (
        "A2POTrainer AsyncDistillationTrainer DPPOTrainer DistillationTrainer GFPOTrainer GKDTrainer GOLDTrainer "
        "GRPOWithReplayBufferTrainer IWOPDTrainer MiniLLMTrainer PAPOTrainer SDFTTrainer SDPOTrainer SSDTrainer "
        "ServerDistillationTrainer TPOTrainer"
    ),
    BY_REWARD: (
        "AllTrueJudge BaseBinaryJudge BaseJudge BasePairwiseJudge BaseRankJudge HfPairwiseJudge OpenAIPairwiseJudge PairRMJudge "
        "RandomPairwiseJudge RandomRankJudge"
    ),
    SIX_LINES: "BEMACallback MergeConfig MergeModelCallback",
    "trainers prepare the models that they are given by themselves: leave it out.": (
        "prepare_deepspeed prepare_fsdp prepare_peft_model"
    ),
    "give a `rollout_func`: see docs/scaling.md.": "generate_rollout_completions get_nemo_gym_rollout_func",
    PADDING: "DPODataCollatorWithPadding DataCollatorForPreference RewardDataCollatorWithPadding",
    "use `ScriptArguments`.": "GRPOScriptArguments KTOScriptArguments RLOOScriptArguments",
    REPORT: "LogCompletionsCallback WeaveCallback WinRateCallback",
    "use `OnlineDPOTrainer`.": "NashMDTrainer XPOTrainer",
    "tool calls are not supported yet; `PPOTrainer.step` trains on rollouts that your own loop produced.": (
        "TextEnvironment TextHistory"
    ),
    "tool calls are not supported yet.": "add_response_schema supports_tool_calling",
}
REMOVED = {name: advice for advice, names in _TOGETHER.items() for name in names.split()}
REMOVED |= {
    "AsyncGRPOTrainer": "use `GRPOTrainer`: an `engine` of your own may sample in other processes.",
    "BestOfNSampler": "sample with `LocalEngine` and `n=…`, and keep the best of each group.",
    "ConstantLengthDataset": "use `SFTConfig(packing=True)`, or `pack_dataset`.",
    "DDPOStableDiffusionPipeline": "it is a base class: use `DefaultDDPOStableDiffusionPipeline`.",
    "DataCollatorForChatML": "`SFTTrainer` takes `messages` as they are, and `assistant_only_loss=True`.",
    "DataCollatorForLanguageModeling": "import it from `transformers`; without a `data_collator`, trainers pad and batch rows by themselves.",
    "AdaptiveKLController": "set `adap_kl_ctrl=True`, `target` and `horizon` of `PPOConfig`.",
    "FDivergenceConstants": "give `f_divergence_type` and `f_alpha_divergence_coef` of `DPOConfig`.",
    "FixedKLController": "set `adap_kl_ctrl=False` and `init_kl_coef` of `PPOConfig`.",
    "FDivergenceType": "give `f_divergence_type` of `DPOConfig` as a str.",
    "GMPOTrainer": 'use `GRPOTrainer` with `GRPOConfig(loss_type="gmpo")`, and `epsilon=0.4`, as its paper has.',
    "IterativeSFTTrainer": "train an `SFTTrainer` on each round's rows.",
    "PPODecorators": "set `optimize_device_cache=True` of `PPOConfig`.",
    "PPOv2Trainer": "use `PPOTrainer`: it has the whole loop, `train()`.",
    "PRMTrainer": "use `RewardTrainer` with rows of `prompt`, `completions`, `labels`.",
    "PreTrainedModelWrapper": "it is a base class: use `AutoModelForCausalLMWithValueHead`.",
    "VLLMClient": "set `use_vllm=True` of the configuration: see docs/scaling.md.",
    "SUPPORTED_ARCHITECTURES": "value heads are added to every architecture of `transformers` that generates text.",
    "compute_accuracy": "`RewardTrainer` logs `accuracy` already.",
    "disable_dropout_in_model": "set `disable_dropout=True` of the configuration.",
    "enable_selective_activation_checkpointing": "set `gradient_checkpointing=True` of the configuration.",
    "generate_model_card": "every trainer writes one: `trainer.create_model_card()`.",
    "get_training_chat_template": "`assistant_only_loss=True` works with any chat template, unpatched.",
    "get_act_offloading_ctx_manager": "set `activation_offloading=True` of the configuration.",
    "pack_examples": "use `pack_dataset`, or `packing=True` of the configuration.",
    "peft_module_casting_to_bf16": "set `bf16=True` of the configuration: weights keep the dtype that they were loaded in.",
    "prepare_multimodal_messages": "rows with images are read as they are: see docs/vision.md.",
    "truncate_dataset": "set `max_length` of the configuration: trainers count truncated rows, and report them.",
    "unwrap_model_for_generation": "trainers gather sharded weights for sampling by themselves; elsewhere call `trainer.accelerator.unwrap_model(model)`.",
}
REMOVED |= {name.replace("Trainer", "Config"): advice for name, advice in REMOVED.items() if name.endswith("Trainer")}
"""Names of other releases that do not exist here, and what to use instead."""


class LegacyImportFinder(MetaPathFinder, Loader):
    """Import hook that creates the modules of `PATHS`, whose attributes are those of `trl`.

    Where a package lacks an attribute, `from package import name` tries to import it as a submodule, so this finder can raise
    an ImportError with advice. `hasattr` does not try that, and returns False.
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
"""Existing packages from which scripts import names of other releases."""


def _is_old(module: str) -> bool:
    """True for modules that only scripts for other releases import from."""
    return any(module == old or module.startswith(f"{old}.") for old in (*PATHS, "trl.core"))


def _not_here(path: str, name: str) -> str:
    """Message for a name that does not exist here: what to use instead, or the most similar name."""
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
    """The AttributeError that a module's `__getattr__` raises for a missing name."""
    return AttributeError(_not_here(path, name), name=name)


def names_for(path: str) -> Callable[[str], Any]:
    """Make a `__getattr__` for the module `path` that looks names up in `trl`."""

    def find(name: str) -> Any:
        trl = importlib.import_module("trl")
        if name in CLASSIC:
            return getattr(importlib.import_module("trl.classic"), name)
        if name.startswith("__") or name not in trl.__all__:
            raise missing(path, name)
        return getattr(trl, name)

    return find
