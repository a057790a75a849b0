"""How the layers of a language model are run: in few kernels, compiled, as CUDA graphs, and with which activations kept."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from trl.errors import ConfigError
from trl.models.checkpointing import checkpointable_layers
from trl.models.compiled import compile_layers
from trl.models.fused import fuse
from trl.models.fused_adapters import fuse_adapters
from trl.models.graphs import capture_as, capture_layers, release
from trl.models.half_weights import round_together
from trl.models.kept_activations import keep_less
from trl.models.load import has_dropout
from trl.models.reference import Reference
from trl.models.rotary import length_dependent
from trl.models.score import score, unwrap, without_wrapper
from trl.models.value_heads.auto_models import WithValueHead
from trl.models.varlen import VARLEN
from trl.ops.logprobs import has_triton
from trl.trainers.activation_plan import ActivationPlan, CheckpointFirstLayers, free_bytes, plan_activations
from trl.trainers.config import TrainerConfig
from trl.trainers.reference import reference_models
from trl.training.step_trainer import StepTrainer
from trl.types import Batch

logger = logging.getLogger(__name__)


class RunsLayers(StepTrainer):
    """Prepares the layers of a model, once it is where it is trained."""

    args: TrainerConfig
    layout: str
    images: Any
    reference: Reference | None = None
    """What the policy is compared with, where it is."""
    has_own_collator: bool = False
    """Whether a `data_collator` was given, which may make anything of rows."""
    activation_plan: ActivationPlan | None = None
    """Which layers are checkpointed, once that was planned."""

    def forward_pass(self, model: Any, batch: Batch) -> Any:
        """What the losses of a batch are made of: log-probabilities, or rewards."""
        return score(model, batch)

    def _spare_launches(self, inner: PreTrainedModel) -> None:
        """Do with few kernels, and keep little for backward, what the model's layers would launch and keep much for."""
        if self._fuses():
            fuse(self.model)
            fuse_adapters(self.model)
            keep_less(self.model)
        if self.args.torch_compile:
            compile_layers(inner, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        if (self.args.bf16 or self.args.fp16) and not self.is_sharded:
            round_together(inner)

    def _fuses(self) -> bool:
        """Whether norms and rotations are to be single kernels, which compiled layers and Liger's have already."""
        has_them = self.args.torch_compile or self.args.use_liger_kernel
        return self._is_on_cuda() and has_triton() and not has_them and not self.is_sharded

    def _capture_layers(self, inner: PreTrainedModel) -> None:
        """Let forward and backward be CUDA graphs. Raises ConfigError where that is asked for, and cannot be."""
        args, checkpointing = self.args, self.args.gradient_checkpointing_kwargs or {}
        recomputes = args.gradient_checkpointing and (self.activation_plan is not None or not self.plans_activations())
        reasons = {
            "a device other than CUDA": not self._is_on_cuda(),
            "FSDP and DeepSpeed": self.is_sharded,
            "attention that needs masks": inner.config._attn_implementation != VARLEN or self.layout == "padded",
            "quantised weights": getattr(inner, "hf_quantizer", None) is not None,
            "the load-balancing loss of experts": self.term is not None,
            "a value head, which looks at layers": isinstance(without_wrapper(self.model), WithValueHead),
            "images": self.images is not None,
            "a rotary embedding that depends on lengths": bool(length_dependent(inner.config)),
            "neftune_noise_alpha": args.neftune_noise_alpha is not None,
            "activation_offloading": args.activation_offloading,
            "use_liger_kernel": args.use_liger_kernel,  # replays of its layers have other numbers, as was seen on an H200
            "dropout in checkpointed layers": recomputes and has_dropout(inner),
            "reentrant checkpointing": checkpointing.get("use_reentrant", False),
        }
        release(inner, for_good=True)  # of a trainer before this one, with other options
        reason = next((words for words, holds in reasons.items() if holds), None)
        if args.cuda_graphs and reason is not None:
            raise ConfigError(f"cuda_graphs=True does not go with {reason}: leave one of them out.")
        if reason is None and (self.captures_unasked() if args.cuda_graphs is None else args.cuda_graphs):
            if recomputes:  # nothing is drawn, and a random generator cannot be read in a capture
                args.set_checkpointing(use_reentrant=False, preserve_rng_state=False)
            capture_layers(inner)
            for reference in reference_models(self.reference):
                capture_as(reference, inner)

    def captures_unasked(self) -> bool:
        """Whether layers are CUDA graphs where `cuda_graphs` does not say."""
        return True

    # ---- activations ----

    def plans_activations(self) -> bool:
        """Whether layers are to be checkpointed as memory asks for: where nobody said, and what they keep is known beforehand."""
        layers = checkpointable_layers(unwrap(self.model))
        return (
            self.args.plans_checkpointing
            and isinstance(self.train_dataset, Dataset)
            and not self.has_own_collator
            and not self.is_sharded
            and not self.args.torch_compile
            and self.images is None
            and bool(layers)
            and not any(layer.gradient_checkpointing for layer in layers)  # by model.gradient_checkpointing_enable()
        )

    def _plan_activations(self) -> None:
        """Before the first step, when all else is in memory: say which layers are checkpointed, and see to it."""
        if self.activation_plan is not None or not self.plans_activations():
            return
        try:
            plan = plan_activations(self, self._free_bytes())
            logger.info("%s", plan)
        except RuntimeError as error:  # such as no memory for a part of a step
            plan = ActivationPlan.of_all(unwrap(self.model))
            logger.warning(f"Activations are {plan.what}: what they take was not found ({error}).")
        self.activation_plan = plan
        self.args.recompute(activations=plan.recomputed > 0)
        if 0 < plan.recomputed < plan.layers:
            self.add_callback(CheckpointFirstLayers(plan.recomputed))
        self._capture_layers(unwrap(self.model))

    def keeps_activations(self) -> bool:
        """Whether there are layers that are not checkpointed, and can be."""
        return not all(layer.gradient_checkpointing for layer in checkpointable_layers(self.model))

    def _leave_layers_open(self) -> None:
        """After training with a plan: no layer is checkpointed, so that a further trainer of this model makes a plan too."""
        if self.activation_plan is not None:
            for layer in checkpointable_layers(self.model):
                layer.gradient_checkpointing = False

    def _free_bytes(self) -> int:
        return free_bytes(self.args.device)

    def _is_on_cuda(self) -> bool:
        return self.args.device.type == "cuda"
