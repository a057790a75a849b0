"""Cache image features while the image encoder is frozen, so that each image is encoded once.

    pixel values of a prompt ──encoder──▶ features [T,H] of its T image tokens ──▶ policy, reference, sampler, every epoch

An example then has the input `FEATURES` in place of pixel values. In a batch, features are concatenated as pixel values are: in
the order of prompts, once per occurrence. `with_encoder_outputs` turns them into the argument `mm_encoder_outputs` of
`transformers`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.data.inputs import concatenated
from trl.models.patching import evaluating
from trl.models.sharding import are_whole, is_whole
from trl.types import Concatenated, Example, prompt_key
from trl.vision.encoder_outputs import DEEPSTACK, FEATURES
from trl.vision.families import image_token_ids, joins_of

MIB = 2**20
AT_ONCE = 16
"""Most prompts whose images are encoded in one pass, which bounds the memory of its activations."""


class ImageFeatures:
    """A least-recently-used cache of a model's image features in CPU memory, of at most `limit` bytes.

    others    returns further models that read the same batches; called once, when features are first needed
    encoded   number of prompts whose images were encoded
    """

    def __init__(
        self, model: PreTrainedModel, limit: int, others: Callable[[], Sequence[PreTrainedModel]] = tuple
    ) -> None:
        self.model, self.limit, self.encoded = model, limit, 0
        self._others = others
        self._joins = joins_of(model.config)
        self._kept: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    @cached_property
    def why_not(self) -> str:
        """Why these models have to be given pixel values; empty if they accept features."""
        return why_not_cached(self.model, self._others())

    def of(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with features in place of the image encoder's inputs; unchanged if the encoder is trained or sharded."""
        if not any("pixel_values" in example.inputs for example in examples) or self.why_not:
            return list(examples)
        encoder = encoder_parameters(self.model).values()
        if any(p.requires_grad for p in encoder) or not are_whole(encoder):
            self._kept.clear()
            self._bytes = 0
            return list(examples)
        return self._with_features(examples)

    def _with_features(self, examples: Sequence[Example]) -> list[Example]:
        pixels = [self._pixels(example) for example in examples]
        keys = [prompt_key((), own) if own else None for own in pixels]
        missing = {key: i for i, key in enumerate(keys) if key is not None and key not in self._kept}
        fresh: dict[Hashable, dict[str, Tensor]] = {}
        for group in self._groups([*missing]):
            places = [missing[key] for key in group]
            fresh |= zip(group, self._encode([examples[i] for i in places], [pixels[i] for i in places]), strict=True)
        features = [{} if key is None else fresh.get(key) or self._kept[key] for key in keys]
        self._keep(keys, fresh)
        return [
            replace(example, inputs={**{n: v for n, v in example.inputs.items() if n not in own}, **new})
            for example, own, new in zip(examples, pixels, features, strict=True)
        ]

    def _pixels(self, example: Example) -> dict[str, Tensor]:
        """The inputs of the image encoder: all inputs of images except those with one value per token."""
        if "pixel_values" not in example.inputs:
            return {}
        return {n: v for n, v in example.inputs.items() if isinstance(self._joins.get(n), Concatenated)}

    def _groups(self, keys: list[Hashable]) -> list[list[Hashable]]:
        """The prompts whose images are encoded in one pass: each by itself, on CUDA up to `AT_ONCE`.

        Encoded with images of other prompts, they are rounded otherwise, and a resumed run, whose cache is empty, has others. On
        CUDA a pass takes its time for launches, whatever its size, and other kernels are not exact to the bit either.
        """
        together = self.model.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        count = AT_ONCE if together else 1
        return [keys[i : i + count] for i in range(0, len(keys), count)]

    def _encode(self, examples: Sequence[Example], pixels: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Encode the images of all examples in one pass; return the features of each example."""
        self.encoded += len(examples)
        joined = {}
        for name in pixels[0]:
            join = self._joins[name]
            joined[name] = concatenated([own[name] for own in pixels], join.dim, join.fill).to(self.model.device)
        tokens = image_token_ids(self.model.config)
        counts = [sum(t in tokens for t in _ids(example)) for example in examples]
        parts = {name: values.cpu().split(counts) for name, values in _features(self.model, joined).items()}
        return [{name: values[i] for name, values in parts.items()} for i in range(len(examples))]

    def _keep(self, keys: Sequence[Hashable], fresh: Mapping[Hashable, dict[str, Tensor]]) -> None:
        """Add new features to the cache, and evict the least recently used ones above the limit."""
        for key in filter(None, keys):
            if key in fresh and key not in self._kept:
                self._kept[key] = {name: values.clone() for name, values in fresh[key].items()}
                self._bytes += _size(fresh[key])
            self._kept.move_to_end(key)
        while self._bytes > self.limit:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def _ids(example: Example) -> list[int]:
    return [*example.prompt, *(example.completions[0].ids if len(example.completions) == 1 else ())]


def _size(features: Mapping[str, Tensor]) -> int:
    return sum(values.nbytes for values in features.values())


@torch.no_grad()
def _features(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the image encoder and the projector; return the features, and those of deepstack layers, by input name."""
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    with evaluating(model):
        out = encode(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
    found = {FEATURES: _in_one(out.pooler_output)}
    for layer, features in enumerate(getattr(out, "deepstack_features", None) or ()):
        found[DEEPSTACK.format(layer)] = _in_one(features)
    return found


def _in_one(features: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(features, Tensor):
        return features.reshape(-1, 1, features.shape[-1])
    return torch.cat([own.reshape(-1, own.shape[-1]) for own in features])


def why_not_cached(model: PreTrainedModel, others: Sequence[PreTrainedModel] = ()) -> str:
    """Why image features cannot be cached for this model and `others` that read the same batches; empty if they can."""
    body = model.base_model
    if (
        not hasattr(body, "get_image_features")
        or "mm_encoder_outputs" not in inspect.signature(body.forward).parameters
    ):
        return f"{type(model).__name__} does not accept image features in this release of transformers"
    own = encoder_parameters(model)
    if any("lora_" in name for name in own):
        return "the image encoder has adapters"
    if not all(is_whole(other) and _equal(own, encoder_parameters(other)) for other in others):
        return "the reference has an image encoder of its own"
    return ""


def _equal(ours: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> bool:
    return ours.keys() == theirs.keys() and all(_same(value, theirs[name]) for name, value in ours.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def encoder_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters of a vision-language model outside of its language model: image encoder and projector."""
    parts = filter(None, (model.get_decoder(), model.get_output_embeddings()))
    language = {id(p) for part in parts for p in part.parameters()}
    return {name: p for name, p in model.base_model.named_parameters() if id(p) not in language}
