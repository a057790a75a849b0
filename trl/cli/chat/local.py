"""Chat with a model in this process, which streams its answers token by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from trl.cli.chat.arguments import ChatArguments, Generation
from trl.cli.chat.talk import Message, Say, Stream, TooLong
from trl.cli.loading import load_pretrained
from trl.data.chat import ChatTemplate
from trl.data.multimodal import split_parts
from trl.errors import ModelError
from trl.models.config import ModelConfig
from trl.models.load import count_parameters, tokenizer_of
from trl.report.charts import number
from trl.types import Example, PerToken
from trl.vision.families import family_of, image_token_ids
from trl.vision.processing import ImageProcessing

UNLIMITED = 10**9
"""Tokenizers without a known limit set `model_max_length` to a number at least this large."""

ROOM = 4
"""The messages must leave 1/ROOM of the context to the answer, or `max_new_tokens` if that is less."""


class LocalSpeaker:
    """Answers with `model`. Without a chat template, the prompt is the messages joined by newlines."""

    def __init__(self, model: Any, processor: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        """`processor` is a tokenizer, or a multimodal processor that contains one."""
        self.model, self.processor = model.eval(), processor
        self.tokenizer = tokenizer = tokenizer_of(processor)
        self.inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.images = ImageProcessing.of(processor, self.inner.config) if family_of(self.inner.config) else None
        template = tokenizer.chat_template if self.images is None else processor.chat_template
        self.template = (
            ChatTemplate(tokenizer, template_kwargs=template_kwargs, chat_template=template) if template else None
        )
        self.context = context_of(self.inner, tokenizer)
        self.name = (tokenizer.name_or_path or type(self.inner).__name__).rstrip("/").rpartition("/")[2]
        size = f"{number(count_parameters(model)[1])} parameters"
        window = f"{self.context:,} tokens of context" if self.context else "no limit of context"
        self.details = f"{size} · {window} · {str(self.inner.dtype).removeprefix('torch.')} on {self.inner.device}"
        self.notes = () if self.template else (PLAIN,)

    def answer(self, messages: Sequence[Message], generation: Generation, say: Say) -> int:
        """Sample until an end-of-sequence token, a stop text, or the length limit. Return the number of sampled
        tokens."""
        inputs = {name: value.to(self.inner.device) for name, value in self.encode(messages).items()}
        ids = inputs["input_ids"]
        config = self._config(generation, self._room(ids.shape[1], generation))
        stream = Stream(say, generation.stop)
        streamer = _Spoken(self.tokenizer, stream)
        if generation.seed is not None:
            torch.manual_seed(generation.seed)
        try:
            self.model.generate(
                **inputs,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stopped(stream)]),
            )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"{self.inner.device} ran out of memory after {ids.shape[1] + streamer.tokens:,} tokens: start a new "
                "conversation with `clear`, or restart with --load_in_4bit to use less memory."
            ) from None
        return streamer.tokens

    def encode(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """Arguments of `generate` for the conversation: `input_ids [1,P]`, pixels, token types."""
        prompt = self.prompt(messages)
        joins = {} if self.images is None else self.images.family.joins
        per_token = {name for name, join in joins.items() if isinstance(join, PerToken)}
        rows = {name: value[None] if name in per_token else value for name, value in prompt.inputs.items()}
        return {"input_ids": torch.tensor([prompt.prompt]), **rows}

    def prompt(self, messages: Sequence[Message]) -> Example:
        """The prompt of a conversation: token ids, and pixel inputs of images."""
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            return Example(self.tokenizer(text)["input_ids"], ())
        messages, images = (messages, []) if self.images is None else split_parts(messages)
        text = self.template.prompt(messages)
        text = text if self.images is None else self.images.expand(text, images)[0]
        example = Example(self.tokenizer(text, add_special_tokens=False)["input_ids"], ())
        return example if self.images is None else self.images.with_images(example, images)

    def check_reads_images(self) -> None:
        """Raises ModelError for a text-only model, or one without a chat template to place images with."""
        if self.images is None:
            raise ModelError(f"{self.name} cannot read images: it is a {type(self.inner).__name__}.")
        if self.template is None:
            raise ModelError(f"{self.name} has no chat template, which is needed to place images in a conversation.")

    def _room(self, tokens: int, generation: Generation) -> int:
        """Maximum tokens of an answer to a prompt of `tokens`. Raises TooLong if the prompt leaves too little room."""
        if self.context is None:
            return generation.max_new_tokens
        if self.context - tokens < min(generation.max_new_tokens, max(self.context // ROOM, 1)):
            raise TooLong(
                f"The message has {tokens:,} tokens, and the model's context has {self.context:,}: that leaves too little "
                "room for an answer. Shorten the message."
            )
        return min(generation.max_new_tokens, self.context - tokens)

    def _config(self, generation: Generation, room: int) -> GenerationConfig:
        """The model's own generation config, overridden by the given options."""
        config = copy.deepcopy(self.inner.generation_config)
        config.max_new_tokens, config.max_length = room, None
        config.num_beams, config.num_return_sequences = 1, 1
        config.do_sample = not generation.greedy
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value = None if generation.greedy else getattr(generation, name)
            if value is not None or generation.greedy:
                setattr(config, name, value)
        if generation.repetition_penalty is not None:
            config.repetition_penalty = generation.repetition_penalty
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *image_token_ids(self.inner.config)}) or None
        config.eos_token_id = sorted({*ends, self.tokenizer.eos_token_id} - {None}) or None
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id[0] if config.eos_token_id else 0
        return config


PLAIN = "This model has no chat template, so it is probably not trained to chat. It continues the text of the conversation so far."


class _Spoken(TextStreamer):
    """Passes whole words, without special tokens, to a stream, and counts the tokens of the answer."""

    def __init__(self, tokenizer: Any, stream: Stream) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.stream, self.tokens = stream, -1  # the first call of `put` passes the prompt

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.put(text)
        if stream_end:
            self.stream.end()


class _Stopped(StoppingCriteria):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stream.stopped, device=input_ids.device)


def context_of(inner: Any, tokenizer: Any) -> int | None:
    """The context length: the smaller of the model's and the tokenizer's limits; None if neither is known."""
    said = [getattr(inner.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    return min((size for size in said if size is not None and 0 < size < UNLIMITED), default=None)


def load_speaker(arguments: ChatArguments, model: ModelConfig) -> LocalSpeaker:
    """Load the model that the options name, for chatting."""
    return LocalSpeaker(*load_pretrained(model, device=arguments.device), arguments.chat_template_kwargs)
