"""Optimise how the layers of a language model run: fused kernels, `torch.compile`, CUDA graphs, activation checkpointing."""

from __future__ import annotations

import logging
from typing import Any

import torch
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
from trl.models.score import networks_of, score, unwrap
from trl.models.value_heads.heads import ValueBranch
from trl.models.varlen import VARLEN
from trl.ops.logprobs import has_triton
from trl.trainers.activation_plan import ActivationPlan, CheckpointFirstLayers, free_bytes, plan_activations
from trl.trainers.config import TrainerConfig
from trl.trainers.reference import reference_models
from trl.training.evaluation import EvaluatingTrainer
from trl.types import Batch

logger = logging.getLogger(__name__)


class RunsLayers(EvaluatingTrainer):
    """A trainer that optimises the layers of its model, once that is on its device."""

    args: TrainerConfig
    layout: str = "shared"
    """How prompts and completions are laid out. An encoder-decoder has no choice: it reads a prompt once for all completions."""
    images: Any
    reference: Reference | None = None
    """The reference policy, if there is one."""
    has_own_collator: bool = False
    """Whether the user gave a `data_collator`, so that the size of batches cannot be foreseen."""
    activation_plan: ActivationPlan | None = None
    """Which layers are checkpointed; None before that is planned."""

    def forward_pass(self, model: Any, batch: Batch) -> Any:
        """The forward pass on which losses are computed: log-probabilities, or rewards."""
        return score(model, batch)

    def _optimize_layers(self, inner: PreTrainedModel) -> None:
        """Make the model's layers launch fewer kernels and save fewer activations, as the options allow."""
        if self._fuses():
            fuse(self.model)
            fuse_adapters(self.model)
            keep_less(self.model)
        if self.args.torch_compile:
            compile_layers(inner, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        if (self.args.bf16 or self.args.fp16) and not self.is_sharded:
            round_together(inner)

    def _fuses(self) -> bool:
        """Whether to fuse norms, rotations, LoRA and gated MLPs: on CUDA, unless `torch_compile` or Liger does so already."""
        has_them = self.args.torch_compile or self.args.use_liger_kernel
        return self._is_on_cuda() and has_triton() and not has_them and not self.is_sharded

    def _capture_layers(self, inner: PreTrainedModel) -> None:
        """Capture layers as CUDA graphs if possible. Raises ConfigError if `cuda_graphs=True` and it is not possible."""
        args, on_cuda = self.args, self._is_on_cuda()
        recomputes = args.gradient_checkpointing and (self.activation_plan is not None or not self.plans_activations())
        for network in networks_of(self.model):  # graphs of an earlier trainer of this model, with other options
            release(network, for_good=True)
        if args.cuda_graphs and not on_cuda:
            raise ConfigError("cuda_graphs=True needs CUDA, on an NVIDIA GPU: leave it out.")
        reason = self._rules_graphs_out(inner, recomputes)
        if args.cuda_graphs and reason is not None:
            raise ConfigError(f"cuda_graphs=True cannot be combined with {reason}: leave one of them out.")
        wanted = self.captures_by_default() if args.cuda_graphs is None else args.cuda_graphs
        if not (wanted and on_cuda) or reason is not None:
            return
        if recomputes:  # without dropout no random state is needed, and it cannot be read during capture
            args.set_checkpointing(use_reentrant=False, preserve_rng_state=False)
        capture_layers(inner)
        for other in self._also_reading():
            capture_as(other, inner)

    def _rules_graphs_out(self, inner: PreTrainedModel, recomputes: bool) -> str | None:
        """An option or property of the model that CUDA graphs cannot be combined with; None if there is none."""
        args, family = self.args, None if self.images is None else self.images.family
        looks_ahead = family is not None and family.sees_ahead != "causal"
        has_masks = inner.config._attn_implementation != VARLEN or self.layout == "padded" or looks_ahead
        quantised, in_4_bits = getattr(inner, "hf_quantizer", None), vars(inner).get("is_loaded_in_4bit")
        recomputes_dropout = recomputes and any(map(has_dropout, networks_of(self.model)))
        head = dict(self.model.named_children()).get("v_head")
        reasons = {
            "FSDP and DeepSpeed": self.is_sharded,
            "attention with masks": has_masks,
            # Kernels for 8 bits tell the host whether there are outliers.
            "quantised weights other than those in 4 bits of bitsandbytes": quantised is not None and not in_4_bits,
            "the load-balancing loss of experts": self.term is not None,
            "num_value_layers": isinstance(head, ValueBranch),  # which reads a lower layer by a hook
            "a rotary embedding that depends on lengths": bool(length_dependent(inner.config)),
            "neftune_noise_alpha": args.neftune_noise_alpha is not None,
            "activation_offloading": args.activation_offloading,
            "use_liger_kernel": args.use_liger_kernel,  # replays of its layers give different results, as seen on an H200
            "dropout in checkpointed layers": recomputes_dropout,
            "reentrant checkpointing": (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False),
        }
        return next((words for words, holds in reasons.items() if holds), None)

    def _also_reading(self) -> list[PreTrainedModel]:
        """Other models that run on the policy's batches: a value network, a reference."""
        return [*networks_of(self.model)[1:], *reference_models(self.reference)]

    def captures_by_default(self) -> bool:
        """Whether layers are captured as CUDA graphs if `cuda_graphs` is None."""
        return True

    # ---- activations ----

    def plans_activations(self) -> bool:
        """Whether to choose checkpointed layers by free memory: if options leave it open, and activations can be estimated."""
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
        """Choose and apply the checkpointed layers, before the first step, when everything else is in memory."""
        if self.activation_plan is not None or not self.plans_activations():
            return
        try:
            plan = plan_activations(self, self._free_everywhere())
            logger.info("%s", plan)
        except RuntimeError as error:  # such as running out of memory while measuring
            plan = ActivationPlan.of_all(unwrap(self.model))
            logger.warning(f"Activations are {plan.what}, since their size could not be measured ({error}).")
        self.activation_plan = plan
        self.args.recompute(activations=plan.recomputed > 0)
        if 0 < plan.recomputed < plan.layers:
            self.add_callback(CheckpointFirstLayers(plan.recomputed))
        self._capture_layers(unwrap(self.model))

    def keeps_activations(self) -> bool:
        """Whether some layers that can be checkpointed are not."""
        return not all(layer.gradient_checkpointing for layer in checkpointable_layers(self.model))

    def _undo_activation_plan(self) -> None:
        """Disable checkpointing that the plan enabled, after training, so that a further trainer of this model can plan again."""
        if self.activation_plan is not None:
            for layer in checkpointable_layers(self.model):
                layer.gradient_checkpointing = False

    def _free_bytes(self) -> int:
        return free_bytes(self.args.device)

    def _free_everywhere(self) -> int:
        """The free bytes of the device that has the fewest, so that all processes make the same plan."""
        return int(self._gather(torch.tensor([self._free_bytes()])).min())

    def _is_on_cuda(self) -> bool:
        return self.args.device.type == "cuda"
