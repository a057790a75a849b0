"""Pipelines of `diffusers` as they are trained: loaded, frozen but for one part, and saved.

What is trained is the pipeline's denoiser, whole or by an adapter (LoRA). Text encoders and the VAE stay as they are.
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
from trl.models.names import explain_missing

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
"""Layers that LoRA goes into by default: the projections of attention, as UNets and transformers call them."""
JOINT_ATTENTION = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
"""Those of the text, where a transformer attends to text and picture together."""


def load_pipeline(model: Any, **options: Any) -> Any:
    """The pipeline of a name or folder, with `options` of its `from_pretrained`, or one that is loaded already.

    Raises ConfigError for options to a pipeline that is loaded, and for a name that diffusers finds nothing under.
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
                f"model={str(model)!r} holds no pipeline that diffusers can load (model_index.json and what it names): {error}"
            ) from error
    if options:
        raise ConfigError(f"{', '.join(options)} given, but the pipeline is loaded already: leave them out.")
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ModelError(
            f"A {type(model).__name__} is no pipeline of diffusers: give a pipeline, or its name or folder."
        )
    return model


def loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` of a model of `transformers`, as pipelines take them.

    Raises ConfigError for options that a pipeline has no use for.
    """
    options = dict(given)
    for name in ("attn_implementation", "adapter"):
        if options.pop(name, None) is not None:
            raise ConfigError(
                f"{name} is of language models, and has no effect on a pipeline of diffusers: leave it out."
            )
    dtype = options.pop("dtype", None)
    if dtype not in (None, "auto"):
        options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return options


def prepare_pipeline(pipeline: Any, part: str) -> nn.Module:
    """Freeze everything but `part`, which is returned; take off what would change pictures unseen.

    A safety checker blackens pictures, and rewards would be those of black ones: it is not run, and that is said.
    """
    if getattr(pipeline, "safety_checker", None) is not None:
        logger.warning(
            "The pipeline's safety checker is taken off while it is trained: it blackens pictures, and rewards would be "
            "those of black ones. Put it back before pictures are shown to others."
        )
        pipeline.safety_checker = None
        pipeline.register_to_config(requires_safety_checker=False)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != part:
            component.requires_grad_(False).eval()
    vae = pipeline.vae
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.to(torch.float32)  # it overflows in half precision, and says so in its configuration
    return getattr(pipeline, part)


def add_adapter(module: nn.Module, config: PeftConfig | None, part: str) -> bool:
    """Put a LoRA adapter into the denoiser, the only part of it to train; without one, all of it trains.

    An adapter that names no `target_modules` goes into the projections of attention, those of texts included where the
    denoiser has its own. `part` is the denoiser's name in the pipeline. Returns whether there is an adapter: a new one, or
    one that the pipeline was given before.
    """
    if config is not None:
        if module_has_adapter(module):
            raise ConfigError("peft_config is a new adapter, but the model has one already: leave out one of them.")
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
            parameter.data = parameter.data.float()  # small steps of an adapter are lost in half precision
    return module_has_adapter(module)


def module_has_adapter(module: nn.Module) -> bool:
    return bool(getattr(module, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """The model below its adapter, meanwhile."""
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class SwappedWeights:
    """A second set of the trained weights: an average, or those of an earlier policy.

    Only the trained parameters are kept twice: with an adapter, little.
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
        """The module with these weights, meanwhile."""
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
    """What was trained: the adapter as one file that pipelines load, or the denoiser in a folder of its name."""
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
    """The whole pipeline; of a denoiser with an adapter the weights below it, and beside them the adapter."""
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
    """Give `module` what `save_trained` wrote. Raises ConfigError where the folder holds something else."""
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
            f"{str(folder)!r} does not hold what is trained here ({file.name}): give the folder of such a run."
        )
