"""Choose the fastest batch layout in which a model gives correct results.

Each layout is checked on a few tokens: log-probabilities (or rewards, for a classifier) must equal those of the padded layout.
Sliding windows are longer than these sequences, so they are shortened during the check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl.data.layout import LAYOUTS, lay_out
from trl.errors import ConfigError, unknown
from trl.models.attention import SEGMENT_ATTENTION, attention_of, other_layers
from trl.models.patching import evaluating
from trl.models.rotary import length_dependent
from trl.models.score import score
from trl.models.sharding import is_whole
from trl.models.varlen import VARLEN, has_varlen, switch
from trl.ops.products import exact_products, has_bfloat16
from trl.types import Batch, Completion, Example
from trl.vision.families import joins_of

logger = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel, Batch], Tensor]

PREFERENCE = {True: ("shared", "packed", "padded"), False: ("packed", "shared", "padded")}
"""Whether prompts have several completions → layouts from fastest to slowest."""

TRIAL = (
    Example([5, 3, 8], (Completion([4, 9]), Completion([7, 2, 6, 3]))),
    Example([], (Completion([3, 9, 4, 5, 8]),)),
)

TRIAL_WINDOW = 3
"""Sliding window during the check, in tokens."""


def _logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    return score(model, batch).logprobs


def choose_layout(
    model: PreTrainedModel,
    layout: str = "auto",
    *,
    multiple_completions: bool = False,
    measure: Measure = _logprobs,
    examples: Sequence[Example] | None = None,
    half: bool = False,
) -> str:
    """Choose a layout: `layout` itself if the model supports it, or with "auto" the fastest that it supports.

    `examples` are the sequences to check with; a vision-language model needs some with images. `multiple_completions` says
    that prompts have several completions. `measure(model, batch)` returns the numbers per completion by which layouts are
    compared. Raises ConfigError with the reason if the model does not support `layout`; "auto" falls back to a slower layout
    and logs the reason. On CUDA, models in half precision, or under autocast (`half`), are switched to variable-length
    attention if they support it: see `trl.models.varlen`.
    """
    if layout not in (*LAYOUTS, "auto"):
        raise ConfigError(unknown("layout", layout, [*LAYOUTS, "auto"]))
    half = half or model.dtype in (torch.bfloat16, torch.float16)
    reasons = {}
    for candidate in PREFERENCE[multiple_completions] if layout == "auto" else (layout,):
        if half and _switch_to_varlen(model, candidate, measure, examples):
            break
        if not (reason := why_not(model, candidate, measure=measure, examples=examples)):
            break
        reasons[candidate] = reason
    if layout in reasons:
        raise ConfigError(f"layout={layout!r} does not work with {type(model).__name__}: {reasons[layout]}.")
    if reasons:
        why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
        logger.warning(f"Using layout {candidate!r} for {type(model).__name__} ({why}).")
    return candidate


def why_not(
    model: PreTrainedModel, layout: str, *, measure: Measure = _logprobs, examples: Sequence[Example] | None = None
) -> str:
    """Why `model` does not support a layout; empty if it does. `examples` are the sequences to check with."""
    if layout == "padded":
        return ""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder reads its prompt in the encoder"
    if not is_whole(model):
        return "its weights are sharded already, so the layout cannot be checked"
    if layout == "shared":
        implementation = attention_of(model.config)
        if implementation not in SEGMENT_ATTENTION:
            return f"attention implementation {implementation!r} does not accept a custom mask"
        if kinds := other_layers(model.config):
            return f"it has {', '.join(kinds)} layers"
        if kind := length_dependent(model.config):
            return (
                f"its rotary embedding ({kind}) depends on the length of a sequence, and completions differ in length"
            )
    return _trial(model, layout, measure, TRIAL if examples is None else examples)


def _switch_to_varlen(
    model: PreTrainedModel, layout: str, measure: Measure, examples: Sequence[Example] | None
) -> bool:
    """Switch the model to variable-length attention if it then gives the same results in this layout; return whether."""
    if layout == "padded" or model.config.is_encoder_decoder or not is_whole(model) or not has_varlen(model):
        return False
    before = model.config._attn_implementation
    switch(model, VARLEN)
    examples = TRIAL if examples is None else examples
    reason = _trial(model, layout, measure, examples)
    if not reason and model.dtype == torch.float32:  # training uses autocast, and only then the kernel
        half = torch.bfloat16 if has_bfloat16() else torch.float16
        with torch.autocast(model.device.type, half):
            reason = _trial(model, layout, measure, examples)
    if not reason:
        return True
    logger.warning(f"Variable-length attention is not used for {type(model).__name__}: {reason}.")
    switch(model, before)
    return False


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten the sliding window within the context, so that it is smaller than the sequences of the check."""
    config = model.config.get_text_config()
    window = config.to_dict().get("sliding_window")
    if window is None:
        yield
        return
    config.sliding_window = min(window, TRIAL_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


@torch.no_grad()
def _trial(model: PreTrainedModel, layout: str, measure: Measure, examples: Sequence[Example]) -> str:
    joins, capacity = joins_of(model.config), 3 * sum(example.tokens for example in examples)
    try:
        with evaluating(model), _short_windows(model), exact_products():
            expected = measure(model, lay_out(examples, "padded", joins=joins).to(model.device))
            spans = model.config._attn_implementation == VARLEN
            rows = lay_out(examples, layout, capacity=capacity, joins=joins, spans=spans)
            found = measure(model, rows.to(model.device))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return f"its forward fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    tolerance = 1e-4 if exact else 5e-2
    worst = (found - expected).abs().max().item()
    return "" if worst < tolerance else f"its results differ by {worst:.2g} from those of separate sequences"
