"""`trl eval`: measure a model by rewards of its samples, perplexity, benchmarks, or its win rate against another model.

trl eval --model_name_or_path qwen-sft --dataset_name prompts.jsonl --reward_funcs rewards.py:short
trl eval --model_name_or_path qwen-dpo --against qwen-sft --dataset_name prompts.jsonl --reward_funcs ./qwen-reward
trl eval --model_name_or_path qwen-sft --dataset_name chats.jsonl --perplexity
trl eval --model_name_or_path qwen-sft --benchmarks gsm8k ifeval --chat
trl eval --model_name_or_path qwen-vl-dpo --dataset_name questions.jsonl --pope
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from trl.cli.evaluation.arguments import EvalArguments
from trl.cli.evaluation.objects import check_objects, object_scores
from trl.cli.loading import load_pretrained
from trl.cli.parser import ParsedOptions
from trl.cli.rewards import find_reward
from trl.cli.train import model_to_load
from trl.data.formats import detect_kind
from trl.data.multimodal import images_of
from trl.data.sources import load_splits, take_split
from trl.errors import DataError
from trl.evaluation.benchmarks import run_benchmarks
from trl.evaluation.judges import RewardJudge, ServerJudge, plain
from trl.evaluation.samples import sample
from trl.evaluation.statistics import estimate
from trl.models.load import tokenizer_of
from trl.trainers.option_effects import warn_of_image_options
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.vision.images import PixelLimits
from trl.vision.processing import ImageProcessing

NOT_FOR_REWARDS = ("prompt", "completion", "chosen", "rejected")


def run(arguments: EvalArguments, given: ParsedOptions) -> int:
    results = evaluate(arguments, given)
    folder = Path(arguments.output_dir).expanduser()
    told = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in results.items()}
    (folder / "eval.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    print(f"The numbers are in {folder / 'eval.json'}.")
    return 0


def evaluate(arguments: EvalArguments, given: ParsedOptions) -> dict[str, Any]:
    """Compute the requested measurements, by name. Raises ConfigError, DataError."""
    config = model_to_load(given)
    rows = None if arguments.dataset_name is None else read_rows(arguments)
    Path(arguments.output_dir).expanduser().mkdir(parents=True, exist_ok=True)
    model, processor = load_pretrained(config)
    results: dict[str, Any] = run_benchmarks(
        model,
        tokenizer_of(processor),
        arguments.benchmarks or [],
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        tasks_folder=arguments.benchmarks_folder,
        chat=arguments.chat,
        seed=arguments.seed,
    )
    if rows is None:
        return results
    if arguments.perplexity:
        return results | perplexity(model, processor, rows, arguments)
    return {**results, **compare_samples(arguments, given, rows, model, processor)}


def read_rows(arguments: EvalArguments) -> Any:
    """The rows to evaluate on. Raises DataError if the split does not exist."""
    splits = load_splits(arguments.dataset_name)
    split = arguments.dataset_split
    if split == EvalArguments.dataset_split and list(splits) == ["train"]:
        print("The dataset has only the split 'train': using its rows.")
        split = "train"
    rows = take_split(splits, split, arguments.dataset_name)
    return rows if arguments.limit is None else rows.select(range(min(arguments.limit, len(rows))))


def perplexity(model: Any, processor: Any, rows: Any, arguments: EvalArguments) -> dict[str, Any]:
    """exp of the mean loss of the tokens that SFT would train on, and the number of these tokens."""
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_eval_batch_size=arguments.batch_size,
            assistant_only_loss=arguments.assistant_only_loss,
            html_report=False,
            report_to="none",
            max_length=None,
            image_folder=arguments.image_folder,
            max_pixels=arguments.max_pixels,
        )
        trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
        trainer.remove_callback(PrinterCallback)  # the results are printed by `run`
        value = math.exp(trainer.evaluate()["eval_loss"])
        return {"perplexity": value, "tokens": trainer.encoded["eval"].report.trained}


def with_prompts(rows: Any) -> Any:
    """The rows with a column `prompt`: of chats, the turns before the last answer. Raises DataError for other rows."""
    if "prompt" in rows.column_names:
        return rows
    if "messages" not in rows.column_names:
        raise DataError(
            f"Sampling needs a column 'prompt', or chats in a column 'messages', but the dataset has {rows.column_names}. To "
            "score texts: --perplexity."
        )
    print("The prompts are the chats in 'messages' without their last answers.")
    return rows.map(lambda row: {"prompt": before_answer(row["messages"])})


def before_answer(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """A chat without the answer that it ends with, if it ends with one."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def compare_samples(
    arguments: EvalArguments, given: ParsedOptions, rows: Any, model: Any, processor: Any
) -> dict[str, Any]:
    """Sample completions and write them to samples.jsonl. Return their lengths, rewards and win rate."""
    rows = with_prompts(rows)
    check_objects(arguments, rows)
    prompts = rows["prompt"][:]
    images = _images(model, processor, rows, arguments)
    kept: dict[str, Sequence[Any]] = {
        "prompt": prompts,
        "completion": _samples(model, processor, images, rows, arguments),
    }
    results: dict[str, Any] = {"characters": estimate([len(plain(each)) for each in kept["completion"]])}
    results |= object_scores(arguments, rows, kept["completion"])
    judge = RewardJudge(list(map(find_reward, arguments.reward_funcs))) if arguments.reward_funcs else None
    columns = {n: rows[n][:] for n in rows.column_names if n not in NOT_FOR_REWARDS}
    if judge is not None and images is not None:
        columns["images"] = [images.read(images_of(row)) for row in rows]
    if judge is not None:
        kept["reward"] = judge.score(prompts, kept["completion"], **columns)
        results["reward"] = estimate(kept["reward"])
    if arguments.against is not None:
        loaded = load_pretrained(model_to_load(given, arguments.against))
        kept["other"] = _samples(*loaded, _images(*loaded, rows, arguments), rows, arguments)
        both = prompts, kept["completion"], kept["other"]
        server = arguments.judge_server
        kept["win"] = judge(*both, **columns) if server is None else ServerJudge(server, arguments.judge_model)(*both)
        results["win rate"] = estimate(kept["win"])
    path = Path(arguments.output_dir).expanduser() / "samples.jsonl"
    lines = (dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True))
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return results


def _images(model: Any, processor: Any, rows: Any, arguments: EvalArguments) -> Any:
    """The image processing of a model; None for a text-only model. Raises DataError if that model's rows have
    images."""
    limits = PixelLimits(arguments.max_pixels, root=arguments.image_folder)
    images = ImageProcessing.of(processor, model.config, limits)
    detect_kind(rows.column_names, allowed=["prompt_only"], reads_images=images is not None)
    if images is None:
        warn_of_image_options(arguments)
    return images


def _samples(model: Any, processor: Any, images: Any, rows: Any, arguments: EvalArguments) -> list[Any]:
    return sample(
        model,
        tokenizer_of(processor),
        rows,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        images=images,
    )
