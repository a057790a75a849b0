"""Options of the command line for the model, and their translation to arguments of `from_pretrained` and peft."""

from __future__ import annotations

import logging
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trl.errors import ConfigError, unknown
from trl.imports import check_available
from trl.models.attention_packages import check_attention_packages
from trl.option_names import Options
from trl.option_types import check_choices

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
QuantType = Literal["nf4", "fp4"]
Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


@dataclass
class ModelConfig(Options):
    """The model, its precision, adapters and quantisation."""

    ALIASES: ClassVar[dict[str, str]] = {"torch_dtype": "dtype", "use_flash_attention_2": ""}

    model_name_or_path: str | None = None
    """Hub name or folder of the model."""

    model_revision: str = "main"
    """Branch, tag or commit of the model."""

    adapter_name_or_path: str | None = None
    """Adapter to load on the model. Not needed if `model_name_or_path` is an adapter: its base model is then loaded, too."""

    dtype: str | None = field(default="float32", metadata={"aliases": ["--torch_dtype"]})
    """Precision of the weights: "float32", "bfloat16", "float16", or "auto" for that in which they were saved."""

    attn_implementation: str | None = None
    """Attention implementation: "sdpa", "eager", "flex_attention", "flash_attention_2", …. None: the model's default."""

    trust_remote_code: InitVar[bool] = False
    """Run Python code from the repository of the model or tokenizer."""

    use_peft: bool = False
    """Train a LoRA adapter (arXiv:2106.09685) and freeze the model's weights."""

    lora_r: int = 16
    """Rank r of the adapter."""

    lora_alpha: int = 32
    """α: the adapter's output is scaled by lora_alpha / lora_r (by lora_alpha / √lora_r with `use_rslora`)."""

    lora_dropout: float = 0.05
    """Dropout probability of the adapter's input."""

    lora_target_modules: list[str] | None = None
    """Names of the layers to adapt; "all-linear" for all linear layers but the head. None: peft's default for the
    architecture, or all-linear if it has none."""

    lora_target_parameters: list[str] | None = None
    """Names of parameters to adapt, for weights that are not in an `nn.Linear` (the experts of a mixture)."""

    lora_modules_to_save: list[str] | None = None
    """Layers to train in full and save with the adapter."""

    lora_task_type: Task | None = None
    """Task type of the adapter in peft. None: by the model's architecture."""

    use_rslora: bool = False
    """Scale by 1/√r in place of 1/r (arXiv:2312.03732)."""

    use_dora: bool = False
    """Use DoRA: train magnitude and direction of the weights separately (arXiv:2402.09353)."""

    load_in_8bit: bool = False
    """Quantise the weights to 8 bits; training then needs `use_peft`."""

    load_in_4bit: bool = False
    """Quantise the weights to 4 bits; training then needs `use_peft` (QLoRA, arXiv:2305.14314)."""

    bnb_4bit_quant_type: QuantType = "nf4"
    """Number format of 4-bit weights: "nf4" or "fp4"."""

    use_bnb_nested_quant: bool = False
    """Quantise the scales of 4-bit weights as well (double quantisation)."""

    bnb_4bit_quant_storage: str | None = None
    """Dtype of the tensors that store 4-bit weights, for example "bfloat16", which FSDP needs. None: "uint8"."""

    def __post_init__(self, trust_remote_code: bool) -> None:
        self.trust_remote_code = trust_remote_code
        if isinstance(self.dtype, str):
            self.dtype = self.dtype.removeprefix("torch.")
            if self.dtype not in DTYPES:
                raise ConfigError(unknown("dtype", self.dtype, DTYPES))
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit are both set: keep one.")
        check_choices(self)
        if not self.load_in_4bit:
            self._warn_without_effect("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
        check_attention_packages(self.attn_implementation)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} is not a probability: give 0 ≤ lora_dropout < 1.")
        if self.lora_r < 1:
            raise ConfigError(f"lora_r={self.lora_r} is not a rank: give 1 or more.")

    def _warn_without_effect(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                logger.warning(
                    f"{name}={value!r} has no effect without load_in_4bit: leave it out, or set load_in_4bit."
                )

    @property
    def hub(self) -> dict[str, str]:
        """`model_revision` as keyword argument of `from_pretrained`: empty for the default branch."""
        return {} if self.model_revision == "main" else {"revision": self.model_revision}

    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`: those that are set, and the revision if it is not the default branch."""
        kwargs = {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "adapter": self.adapter_name_or_path,
        }
        return {name: value for name, value in kwargs.items() if value is not None} | self.hub


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The LoRA configuration of `model_args`; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=_target_modules(model_args.lora_target_modules),
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def _target_modules(names: list[str] | str | None) -> list[str] | str | None:
    """`["all-linear"]` as a string: peft takes a string for "all-linear" or a regular expression, a list for names."""
    return names[0] if names is not None and list(names) == ["all-linear"] else names


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The quantisation configuration of `model_args`; None without `load_in_8bit` or `load_in_4bit`.

    Raises MissingPackageError without bitsandbytes.
    """
    if not (model_args.load_in_8bit or model_args.load_in_4bit):
        return None
    check_available("bitsandbytes", to=f"load_in_{4 if model_args.load_in_4bit else 8}bit")
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=None if model_args.dtype in (None, "auto") else model_args.dtype,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )
