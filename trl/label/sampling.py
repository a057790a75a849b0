"""Completions that a model gives now, to be judged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from trl.cli.train import check_model, check_weights
from trl.data.sources import ScriptArguments, load_dataset_argument
from trl.errors import ConfigError, DataError
from trl.label.arguments import LabelArguments
from trl.models.config import ModelConfig, get_quantization_config
from trl.models.load import load_model, load_processor, tokenizer_of

if TYPE_CHECKING:
    from trl.cli.parser import ParsedOptions


def sample_rows(parsed: ParsedOptions, arguments: LabelArguments) -> list[dict[str, Any]]:
    """Rows of a prompt and `num_generations` completions by the model that was named.

    Raises ConfigError where the prompts are missing, DataError where the dataset has no column `prompt`.
    """
    if arguments.dataset_name is None:
        raise ConfigError("--dataset_name is missing: prompts for the model to continue.")
    prompts = _prompts(arguments)
    name = check_model(parsed.values["model_name_or_path"])
    check_weights(name)
    given = {"dtype": "auto", **parsed.values, "model_name_or_path": name}
    model = replace(parsed, values=given).arguments_for(ModelConfig)
    placement = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    loaded = load_model(
        name,
        quantization_config=get_quantization_config(model),
        trust_remote_code=model.trust_remote_code,
        **{**model.init_kwargs(), **placement},
    )
    tokenizer = tokenizer_of(load_processor(loaded, trust_remote_code=model.trust_remote_code))
    torch.manual_seed(arguments.seed)
    return [
        {"prompt": prompt, "completions": sample(loaded, tokenizer, prompt, arguments)}
        for prompt in tqdm(prompts, desc="Sampling", unit=" prompts")
    ]


def _prompts(arguments: LabelArguments) -> list[Any]:
    script = ScriptArguments(dataset_name=arguments.dataset_name, dataset_train_split=arguments.dataset_split)
    rows = load_dataset_argument(script)[arguments.dataset_split]
    if "prompt" not in rows.column_names:
        raise DataError(f"dataset_name={arguments.dataset_name!r} has no column 'prompt': it has {rows.column_names}.")
    prompts = rows.to_list()[: arguments.limit]
    return [_with_system(row["prompt"], arguments.system_prompt) for row in prompts]


def _with_system(prompt: Any, system: str | None) -> Any:
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Any, arguments: LabelArguments) -> list[Any]:
    """Completions of one prompt: texts, or messages of the assistant where the prompt is a conversation."""
    chat = not isinstance(prompt, str)
    if chat:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    inputs.pop("token_type_ids", None)
    tokens = model.eval().generate(
        **inputs,
        do_sample=True,
        temperature=arguments.temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=arguments.num_generations,
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [[{"role": "assistant", "content": text.strip()}] for text in texts] if chat else texts
