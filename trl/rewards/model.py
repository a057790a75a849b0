"""A trained reward model as a reward function.

    reward = RewardModel("path/to/reward-model")
    reward(["What is 2 + 2?"], ["4."])                     one number per completion

Prompts and completions are texts, conversations, or token ids. They are encoded as in training; a prompt shares one forward
pass with all its completions, if the model allows it, and rewards do not depend on padding.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.data.columns import Columns
from trl.data.encode import EncodeSettings, inputs_of
from trl.data.encoders import prompt_completion
from trl.data.layout import lay_out
from trl.data.multimodal import IMAGES, place_images
from trl.data.row_encoder import INPUTS
from trl.data.tokenization import Tokenization
from trl.data.trees import Tree, keep_end, keep_whole
from trl.errors import DataError, ModelError
from trl.models.layouts import choose_layout
from trl.models.load import explain_missing_tokenizer, load_model, tokenizer_of
from trl.models.rewards import prepare_rewards, score_rewards
from trl.models.score import unwrap
from trl.rewards.signature import check_pairs
from trl.types import Batch, Completion, Example
from trl.vision.families import family_of, joins_of
from trl.vision.processing import ImageProcessing

TOKENS_PER_BATCH = 16_384

Text = str | Sequence[dict[str, Any]] | Sequence[int]
"""A text, a conversation, or token ids."""


class RewardModel:
    """A sequence classifier with one label as a function `(prompts, completions, **columns) -> rewards`.

    model               the classifier, or its name or folder
    tokenizer           its tokenizer, or its processor; None: loaded by the model's name
    max_length          most tokens of prompt and completion; longer ones are cut at the beginning of the prompt. None: no limit
    tokens_per_batch    most tokens in a forward pass, with prompts counted once per completion
    """

    runs_in_trainer = True
    """Keep the function in the trainer's process even with a time limit, since its weights are on the trainer's device."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        **model_kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model = load_model(model, auto_class=AutoModelForSequenceClassification, **model_kwargs)
        elif model_kwargs:
            raise ModelError(
                f"{sorted(model_kwargs)} are options for loading a model by name, but this model is an object."
            )
        inner = unwrap(model)
        prepare_rewards(inner)
        self.model = model.eval()
        processor = _processor_of(inner) if tokenizer is None else tokenizer
        self.tokenizer, self.images = tokenizer_of(processor), ImageProcessing.of(processor, inner.config)
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        trial = None if self.images is None else self.images.trial()
        self.layout = choose_layout(inner, multiple_completions=True, measure=score_rewards, examples=trial)
        self.tokenization = tokenization_of(self.tokenizer, self.images)
        self.__name__ = Path(inner.config._name_or_path or type(inner).__name__).name

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """The rewards of `completions`, each with the prompt at the same index.

        Two columns are used: `images`, for a model with a processor, and `inputs`, further model inputs for each prompt: see
        `trl.types.Example`.
        """
        check_pairs(prompts, completions)
        rewards = [0.0] * len(prompts)
        inputs, images = inputs_of(columns.get(INPUTS), len(prompts)), columns.get(IMAGES)
        trees = self._encode(prompts, completions, images)
        given = [Example(tree.prompt, (), own) for tree, own in zip(trees, inputs, strict=True)]
        for places, examples in self._batches(trees, self._with_images(given, images)):
            pad, joins = self.tokenizer.pad_token_id or 0, joins_of(unwrap(self.model).config)
            batch = lay_out(examples, self.layout, pad_token_id=pad, joins=joins)
            found = self._score(batch.to(unwrap(self.model).device))
            for place, reward in zip(places, found.tolist(), strict=True):
                rewards[place] = reward
        return rewards

    def _with_images(self, prompts: Sequence[Example], images: Sequence[Sequence[Any]] | None) -> list[Example]:
        """The prompts with the model inputs of their images; equal neighbouring prompts with the same images share them."""
        if self.images is None or images is None:
            return list(prompts)
        read: list[Example] = []
        for place, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            again = place > 0 and own is images[place - 1] and prompt.prompt == prompts[place - 1].prompt
            read.append(read[-1] if again else self.images.with_images(prompt, own))
        return read

    def to(self, device: torch.device) -> None:
        """Move the model to `device`."""
        self.model.to(device)

    def _score(self, batch: Batch) -> Tensor:
        """Rewards `[N]` of the batch's completions."""
        return score_rewards(self.model, batch)

    def _encode(
        self, prompts: Sequence[Text], completions: Sequence[Text], images: Sequence[Sequence[Any]] | None
    ) -> list[Tree]:
        if not prompts:
            return []
        if is_ids(completions[0]):
            trees = [Tree(list(p), [list(c)]) for p, c in zip(prompts, completions, strict=True)]
        else:
            columns = Columns({"prompt": list(prompts), "completion": list(completions)}, range(len(prompts)))
            if self.images is not None and images is not None:
                columns = replace(columns, values={**columns.values, IMAGES: list(images)})
                template = self.images.processor.chat_template is not None
                columns = place_images(columns, self.images, has_template=template)
            trees = prompt_completion(columns, self.tokenization)
        if self.max_length is None:
            return trees
        return [self._cut(tree) for tree in trees]

    def _cut(self, tree: Tree) -> Tree:
        """The tree truncated to `max_length`: at the beginning of the prompt, but with images at the end of the completion."""
        whole = 0 if self.images is None else self.images.image_end(tree.prompt)
        kept = keep_whole(tree, whole, None, self.max_length) if whole else keep_end(tree, self.max_length)
        if kept is None:
            raise DataError(
                f"A prompt with images has {len(tree.prompt)} tokens, and max_length={self.max_length}: raise it."
            )
        return kept

    def _batches(self, trees: Sequence[Tree], prompts: Sequence[Example]) -> Iterator[tuple[list[int], list[Example]]]:
        """Yield the examples of one forward pass at a time, similar lengths together, with the indices of their completions."""
        groups: dict[Hashable, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.key, []).append(place)
        places: list[int] = []
        examples: list[Example] = []
        room = self.tokens_per_batch
        for members in sorted(groups.values(), key=lambda members: -max(trees[i].tokens for i in members)):
            size = sum(trees[i].tokens for i in members)
            if examples and size > room:
                yield places, examples
                places, examples, room = [], [], self.tokens_per_batch
            places += members
            answers = tuple(Completion(trees[i].completions[0]) for i in members)
            examples.append(replace(prompts[members[0]], completions=answers))
            room -= size
        if examples:
            yield places, examples


def tokenization_of(tokenizer: PreTrainedTokenizerBase, images: ImageProcessing | None = None) -> Tokenization:
    """The tokenisation of prompts and completions that reward models are trained with."""
    return Tokenization(tokenizer, EncodeSettings(kind="prompt_completion", needs_eos=False), images)


def _processor_of(model: PreTrainedModel) -> Any:
    """The tokenizer of a model that was loaded by name, or the processor of a model that takes images."""
    auto_class = AutoTokenizer if family_of(model.config) is None else AutoProcessor
    name = model.config._name_or_path
    with explain_missing_tokenizer(name):
        return auto_class.from_pretrained(name)


def is_ids(value: Text) -> bool:
    """True if `value` is a list of token ids."""
    return not isinstance(value, str) and all(isinstance(token, int) for token in value)
