"""Load, freeze, adapt and save pipelines of `diffusers`.

Only the pipeline's denoiser is trained, in full or with a LoRA adapter. Text encoders and the VAE are frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from trl.errors import ConfigError, ModelError, ModelNotFoundError
from trl.imports import require
from trl.models.files import follow_umask
from trl.models.not_found import explain_missing

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
"""Default target modules of LoRA: the attention projections of UNets and transformers."""
JOINT_ATTENTION = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
"""The projections of the text in transformers with joint attention on text and picture."""


def load_pipeline(model: Any, **options: Any) -> Any:
    """Load a pipeline by name or folder, with `options` of its `from_pretrained`; or return a pipeline object.

    Raises ConfigError for options with a pipeline object, and for a name or folder that diffusers cannot load.
    """
    diffusers = require("diffusers", to="Training a diffusion model")
    if isinstance(model, str | Path):
        try:
            with explain_missing(str(model)):
                return diffusers.DiffusionPipeline.from_pretrained(str(model), **loading_options(options))
        except OSError as error:
            if isinstance(error, ModelNotFoundError) and not Path(model).is_dir():
                raise
            raise ConfigError(
                f"model={str(model)!r} holds no pipeline that diffusers can load (model_index.json and the parts that it "
                f"names): {error}"
            ) from error
    if options:
        raise ConfigError(f"{', '.join(options)} given, but the pipeline is already loaded: leave them out.")
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ModelError(
            f"A {type(model).__name__} is not a pipeline of diffusers: give a pipeline, or its name or folder."
        )
    return model


def loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options for `from_pretrained` of language models to those of pipelines.

    Raises ConfigError for options that have no effect on a pipeline.
    """
    options = dict(given)
    for name in ("attn_implementation", "adapter"):
        if options.pop(name, None) is not None:
            raise ConfigError(
                f"{name} is an option of language models, and has no effect on a pipeline of diffusers: leave it out."
            )
    dtype = options.pop("dtype", None)
    if dtype not in (None, "auto"):
        options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return options


def prepare_pipeline(pipeline: Any, part: str) -> nn.Module:
    """Freeze everything except `part`, and return that module.

    A safety checker is removed with a warning: it replaces some pictures by black ones, which would then be rewarded.
    """
    if getattr(pipeline, "safety_checker", None) is not None:
        logger.warning(
            "Removing the pipeline's safety checker for training: it replaces some pictures by black ones, and the black ones "
            "would be rewarded. Put it back before you show pictures to others."
        )
        pipeline.safety_checker = None
        pipeline.register_to_config(requires_safety_checker=False)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != part:
            component.requires_grad_(False).eval()
    vae = pipeline.vae
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.to(torch.float32)  # force_upcast: this VAE overflows in half precision
    return getattr(pipeline, part)


def add_adapter(module: nn.Module, config: PeftConfig | None, part: str) -> bool:
    """Add a LoRA adapter to the denoiser and train only that; if `config` is None, train an existing adapter, else all weights.

    Without `target_modules`, the adapter is added to the attention projections, including separate ones for text. `part` is
    the denoiser's name in the pipeline. Returns whether the denoiser has an adapter.
    """
    if config is not None:
        if module_has_adapter(module):
            raise ConfigError(
                "peft_config would add an adapter, but the model already has one: leave peft_config out, or give a model "
                "without adapter."
            )
        module.requires_grad_(False)
        if config.target_modules is None:
            config = copy(config)
            config.target_modules = ATTENTION if part == "unet" else [*ATTENTION, *JOINT_ATTENTION]
        module.add_adapter(config, adapter_name=ADAPTER)
    elif module_has_adapter(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
    else:
        module.requires_grad_(True)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32 and module_has_adapter(module):
            parameter.data = parameter.data.float()  # half precision would round small updates of an adapter away
    return module_has_adapter(module)


def module_has_adapter(module: nn.Module) -> bool:
    return bool(getattr(module, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """Disable the adapter within the context."""
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class SwappedWeights:
    """A second copy of the trained weights, such as a moving average or an earlier policy, to swap in temporarily.

    Only trained parameters are copied, which is little memory for an adapter.
    """

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in trained(module).items()}

    @torch.no_grad()
    def follow(self, module: nn.Module, *, decay: float) -> None:
        """θ' ← decay · θ' + (1 − decay) · θ."""
        for name, parameter in trained(module).items():
            self.weights[name].lerp_(parameter.detach().to(self.weights[name]), 1 - decay)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Use these weights in the module within the context."""
        own = trained(module)
        before = {name: p.data for name, p in own.items()}
        for name, parameter in own.items():
            parameter.data = self.weights[name].to(parameter)
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = before[name]

    def state_dict(self) -> dict[str, Any]:
        return {name: weight.cpu() for name, weight in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state[name])


# ---- files ----


def save_trained(pipeline: Any, part: str, folder: Path) -> None:
    """Save the trained part: the adapter as one file that pipelines can load, or the denoiser in a folder of its name."""
    module = getattr(pipeline, part)
    folder.mkdir(parents=True, exist_ok=True)
    if not module_has_adapter(module):
        module.save_pretrained(folder / part)
        follow_umask(folder / part)
        return
    state = {name: p.contiguous() for name, p in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()}
    described = module.peft_config[ADAPTER].to_dict()
    weights = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": described}
    pipeline.save_lora_weights(folder, weight_name=LORA_FILE, **weights)
    follow_umask(folder)


def save_whole(pipeline: Any, part: str, folder: Path) -> None:
    """Save the whole pipeline; if the denoiser has an adapter, its base weights, and the adapter in a file beside them."""
    module = getattr(pipeline, part)
    if not module_has_adapter(module):
        _save_parts(pipeline, folder)
        return
    below = {name.replace(".base_layer.", "."): p for name, p in module.state_dict().items() if ".lora_" not in name}
    plain = type(module).from_config(module.config).to(module.dtype)
    plain.load_state_dict(below)
    pipeline.register_modules(**{part: plain})
    try:
        _save_parts(pipeline, folder)
    finally:
        pipeline.register_modules(**{part: module})
    save_trained(pipeline, part, folder)


def _save_parts(pipeline: Any, folder: Path) -> None:
    pipeline.save_pretrained(folder)
    for part in pipeline.components:
        follow_umask(folder / part)


def load_trained(module: nn.Module, part: str, folder: Path) -> None:
    """Load into `module` what `save_trained` wrote. Raises ConfigError if the folder does not have it."""
    if module_has_adapter(module):
        file = folder / LORA_FILE
        state = load_file(file) if file.is_file() else {}
        state = {name.removeprefix(f"{part}."): value for name, value in state.items()}
        found = state and not set_peft_model_state_dict(module, state, adapter_name=ADAPTER).unexpected_keys
    else:
        file = folder / part
        if found := file.is_dir():
            module.load_state_dict(type(module).from_pretrained(file).state_dict())
    if not found:
        raise ConfigError(
            f"{str(folder)!r} does not hold the trained weights of this model ({file.name}): give the folder of a run that trained "
            "the same part."
        )
