"""The rollout engine that samples in process, directly from the model in training.

Each prompt is prefilled once for all its samples. There are three ways to decode (the loops are in `loop.py`):

    paged      paged KV cache, static shapes, tokens drawn on the device, CUDA graphs                    `paged_decoder.py`
    shared     one growing KV cache per prompt, shared by its samples: fastest on CPUs                   `decoders.py`
    repeated   a copy of the model's own cache for each sample: recurrent layers, encoder-decoders       `decoders.py`

What they do not support (beam search, …) is sampled by `model.generate`, with one warning.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from trl.errors import ConfigError, DataError, ModelError
from trl.models.gathering import base_of, policy_of
from trl.models.half_weights import linears_of, rounded
from trl.models.patching import evaluating
from trl.models.rotary import first_length, length_dependent, rotate_by_own_length
from trl.models.score import without_wrapper
from trl.models.sharding import whole_weights
from trl.models.value_heads.ilql import WithILQLHeads
from trl.ops.logprobs import has_triton
from trl.ops.products import exact_products
from trl.rollouts.decoders import Policy, Sample
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.generate import generate_rollouts
from trl.rollouts.loop import SamplingLoop, StaticSamplingLoop, Steps
from trl.rollouts.paged_cache import PAGE
from trl.rollouts.paged_decoder import PagedDecoder
from trl.rollouts.repeated_decoder import RepeatedDecoder
from trl.rollouts.sampler import GENERATE_ONLY, PROCESSED, Sampler, options_set
from trl.rollouts.sampling import SamplingParams, asked_limit, with_banned, with_seed, with_stop_tokens
from trl.rollouts.shared_decoder import SharedDecoder, attention_windows, last_token_is_text, matches_plain_forward
from trl.rollouts.stopping import Stopper
from trl.types import Example
from trl.vision.families import image_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trl.models.image_features import ImageFeatures

Way = Literal["paged", "shared", "repeated", "generate"]

TOKENS_ALIVE = 65_536
"""Most tokens in the KV cache, by default."""


class LocalEngine(RolloutEngine):
    """A `RolloutEngine` that samples from `model` with its current weights, adapters included.

    Sharded weights are gathered once per call, so all processes have to make the same number of calls.

    `max_tokens_alive` limits the tokens in the KV cache: a shared prompt counts once, an unfinished sample with its
    `max_new_tokens`; further samples wait, but one is always admitted. The tokenizer is needed for stop strings; its
    end-of-sequence token ends completions as the model's do. `static` chooses the paged KV cache with steps that do not wait
    for the host; None: only on CUDA, where it is faster.
    """

    is_policy = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_tokens_alive: int = TOKENS_ALIVE,
        progress: bool = True,
        static: bool | None = None,
    ) -> None:
        if max_tokens_alive < 1:
            raise ConfigError(f"max_tokens_alive={max_tokens_alive}: give a positive number of tokens.")
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens_alive, self.progress, self.static = max_tokens_alive, progress, static
        self._ways: weakref.WeakKeyDictionary[nn.Module, Way] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()
        self.image_features: ImageFeatures | None = None

    def sync(self, model: nn.Module, step: int) -> None:
        """Sample from `model` from now on. Its weights are used in place; nothing is copied."""
        self.model = model

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1) -> list[list[Rollout]]:
        """n rollouts of each prompt: `result[p][i]` is sample i of `prompts[p]`.

        Raises ConfigError (n below 1, stop strings without a tokenizer), DataError with the index of a prompt that is empty
        or fills the model's context, and ModelError for a model that cannot generate.
        """
        if n < 1:
            raise ConfigError(f"n={n} is the number of samples per prompt: give at least 1.")
        policy = guided(unwrap(self.model), self.model, params)
        rotate_by_own_length(policy.inner)
        params = with_banned(with_seed(params), image_token_ids(policy.inner.config))
        stops = with_stop_tokens(params, policy.inner, self.tokenizer).stop_token_ids
        stopper = Stopper(params, stops, self.tokenizer)
        limits = [new_token_limit(policy.inner, prompt, params, index) for index, prompt in enumerate(prompts)]
        progress = {"disable": None if self.progress else True, "delay": 2, "leave": False}
        bar = tqdm(total=len(prompts) * n, desc="Sampling", unit="sample", **progress)
        plain = torch.compiler.set_stance("force_eager")  # layers were compiled for the shapes of training
        with on(policy.device), whole_weights(self.model), torch.no_grad(), evaluating(policy.model), plain, bar:
            way = self._way(policy, prompts, limits, params)
            if way == "generate":
                _check_unguided(params, policy)
                return generate_rollouts(policy, prompts, limits, params, n, stopper, bar)
            check_device(policy.device)
            prompts = self._with_features(prompts)
            rows = [Sample(p, i, prompt, limits[p]) for p, prompt in enumerate(prompts) for i in range(n)]
            half = autocast_dtype(policy) if way == "paged" else None
            with nullcontext() if half is None else rounded(linears_of(policy.model), half):
                return self._sampling_loop(policy, way, params, stopper, rows, n, bar).run(rows, len(prompts))

    def _with_features(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts with image features in place of pixel values, if the trainer caches such features."""
        if self.image_features is None:
            return prompts
        found = self.image_features.of([Example(prompt.ids, (), prompt.inputs) for prompt in prompts])
        return [replace(prompt, inputs=own.inputs) for prompt, own in zip(prompts, found, strict=True)]

    def _sampling_loop(
        self, policy: Policy, way: Way, params: SamplingParams, stopper: Stopper, rows: list[Sample], n: int, bar: tqdm
    ) -> SamplingLoop:
        if way == "paged":
            decoder = paged_decoder(policy, rows, n, self.max_tokens_alive)
            captures = policy.device.type == "cuda"
            steps = Steps(policy, decoder, params, sorted(stopper.tokens), captures=captures)
            return StaticSamplingLoop(policy, decoder, steps, stopper, self.max_tokens_alive, bar)
        windows = attention_windows(policy.inner) if way == "shared" else None
        decoder = RepeatedDecoder(policy) if windows is None else SharedDecoder(policy, windows, n)
        sampler = Sampler(params, policy.inner, sorted(stopper.tokens), policy.device)
        return SamplingLoop(policy, decoder, sampler, stopper, self.max_tokens_alive, bar)

    def _way(self, policy: Policy, prompts: Sequence[Prompt], limits: Sequence[int], params: SamplingParams) -> Way:
        if options := options_set(params, GENERATE_ONLY):
            return self._fall_back(f"The engine does not support {options[0]} of the generation config")
        if len({p.device for p in policy.model.parameters()}) > 1:
            return self._fall_back("The model's weights are on several devices")
        kind = length_dependent(policy.inner.config)
        if kind and any(may_outgrow(policy, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)):
            return self._fall_back(
                f"The frequencies of the rotary embedding ({kind}) change with the length of a sequence"
            )
        if policy.model not in self._ways:
            static = policy.device.type == "cuda" if self.static is None else self.static
            self._ways[policy.model] = fastest_way(replace(policy, action_values=None), static=static and not kind)
        way = self._ways[policy.model]
        if way == "generate":
            return self._fall_back(f"The engine does not support {type(policy.inner).__name__}")
        if not all(last_token_is_text(policy, prompt) for prompt in prompts):
            return "repeated"
        grows = options_set(params, PROCESSED) or any(prompt.inputs for prompt in prompts)
        return "shared" if way == "paged" and grows else way

    def _fall_back(self, reason: str) -> Way:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"{reason}: model.generate samples one prompt at a time, from the same distribution, but slower.",
                stacklevel=4,
            )
        return "generate"


def unwrap(model: nn.Module) -> Policy:
    """The policy without the wrapper of DDP or FSDP and without value head. Raises ModelError if it cannot generate."""
    model = policy_of(model)
    inner = base_of(model)
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise ModelError(
            f"{type(inner).__name__} cannot be sampled from: give a transformers model with a language-model head."
        )
    return Policy(model, inner)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current CUDA device, if it is one: graphs are captured there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_device(device: torch.device) -> None:
    """Raises ConfigError for Apple's GPUs, which have no float64: with float32 numbers some tokens would never be drawn."""
    if device.type == "mps":
        raise ConfigError(
            "The model is on device mps, which does not compute in float64: sample on the CPU (device cpu)."
        )


def autocast_dtype(policy: Policy) -> torch.dtype | None:
    """The dtype of the autocast within the policy's forward, or None; found by a forward of one token.

    The engine casts weights to it once per call: autocast would cast them in every decode step, which reads each weight once,
    and so would cost more than the step itself.
    """
    found: list[torch.dtype] = []
    device = policy.device

    def look(*_: object) -> None:
        if torch.is_autocast_enabled(device.type):
            found.append(torch.get_autocast_dtype(device.type))

    with policy.inner.get_input_embeddings().register_forward_pre_hook(look):
        policy.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return found[0] if found else None


def guided(policy: Policy, model: nn.Module, params: SamplingParams) -> Policy:
    """The policy with the action values that value guidance needs, if `params.beta` is not 0.

    Raises ModelError for a model without Q heads, and ConfigError for a `logit_mask` that does not fit the vocabulary.
    """
    head = policy.inner.get_output_embeddings()
    if params.logit_mask is not None and len(params.logit_mask) != (vocabulary := head.out_features):
        raise ConfigError(
            f"logit_mask is {tuple(params.logit_mask.shape)}, but the model's vocabulary has {vocabulary} tokens: give one row "
            "and one column for each."
        )
    if not params.beta:
        return policy
    owner = without_wrapper(model)
    if not isinstance(owner, WithILQLHeads):
        raise ModelError(
            f"beta={params.beta} guides samples by Q-values, and this {type(policy.inner).__name__} has no Q heads: train it "
            "with ILQLTrainer, or load it with AutoModelForCausalLMWithILQLHeads."
        )
    return replace(policy, action_values=owner.v_head.action_values)


def _check_unguided(params: SamplingParams, policy: Policy) -> None:
    if params.beta or params.logit_mask is not None:
        name = "beta" if params.beta else "logit_mask"
        raise ConfigError(
            f"{name} works only in the engine's own sampling loop, but this {type(policy.inner).__name__} is sampled by "
            f"model.generate here: leave out beams and other options of generate, or {name}."
        )


def may_outgrow(policy: Policy, prompt: Prompt, limit: int) -> bool:
    """True if the sequence may grow past the length from which the rotary frequencies change, as cached keys then would."""
    return len(prompt) <= first_length(policy.inner.config) < len(prompt) + limit


@exact_products()
def fastest_way(policy: Policy, *, static: bool = False) -> Way:
    """The fastest way to sample that the model supports; "paged" is considered only with `static`."""
    if isinstance(policy.model, PeftModel) and policy.model.active_peft_config.is_prompt_learning:
        return "generate"
    if policy.cache_name is None or not policy.inner._supports_default_dynamic_cache():
        return "generate"
    windows = attention_windows(policy.inner) if "position_ids" in policy.arguments else None
    if windows is None:
        return "repeated"
    if static and _can_be_paged(policy):
        return "paged"
    return (
        "shared"
        if matches_plain_forward(policy, lambda rows: SharedDecoder(policy, windows, len(rows)))
        else "repeated"
    )


def _can_be_paged(policy: Policy) -> bool:
    """Whether a paged decoder gives the logits of a plain forward."""
    try:
        return matches_plain_forward(policy, lambda rows: paged_decoder(policy, rows, len(rows), budget=2**20))
    except Exception as error:  # Triton raises errors of many classes: heads may be too wide for the memory of a card
        warnings.warn(
            f"{type(policy.inner).__name__} is sampled more slowly, since the kernels of a decode step failed: "
            f"{type(error).__name__}: {error}",
            stacklevel=6,
        )
        return False


def has_kernels(device: torch.device) -> bool:
    """Whether decode steps run by Triton's kernels. It uses no tensor cores before Ampere, and compiles for minutes."""
    return device.type == "cuda" and has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


def paged_decoder(policy: Policy, rows: Sequence[Sample], n: int, budget: int) -> PagedDecoder:
    """A paged decoder with pages for all `rows`, or for as many at a time as fit into `budget` tokens, at least one."""
    windows, kernels = attention_windows(policy.inner), has_kernels(policy.device)
    return PagedDecoder(policy, windows, n, rows, budget=budget, page=PAGE, kernels=kernels)


def new_token_limit(inner: PreTrainedModel, prompt: Prompt, params: SamplingParams, index: int) -> int:
    """Most new tokens after this prompt: the requested limit, or what is left of the model's context if that is less."""
    limit = asked_limit(params, prompt.ids, prompt.max_new_tokens, index)
    if inner.config.is_encoder_decoder and prompt.inputs:
        raise DataError(
            f"prompts[{index}] has inputs {sorted(prompt.inputs)}, but encoder-decoders take token ids only: remove them."
        )
    longest = params.generation_config.max_length if params.generation_config is not None else None
    if inner.config.is_encoder_decoder:
        return limit if longest is None else min(limit, longest - 1)
    context = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    for name, total in (("the generation config's max_length", longest), ("the model's context", context)):
        if total is not None and len(prompt) >= total:
            raise DataError(f"prompts[{index}] has {len(prompt)} tokens, {name} is {total}: shorten the prompt.")
        limit = limit if total is None else min(limit, total - len(prompt))
    return limit
