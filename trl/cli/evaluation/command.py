"""`trl eval`: samples of a model, what rewards say of them, perplexity, and how often it wins against another one.

trl eval --model_name_or_path qwen-sft --dataset_name prompts.jsonl --reward_funcs rewards.py:short
trl eval --model_name_or_path qwen-dpo --against qwen-sft --dataset_name prompts.jsonl --reward_funcs ./qwen-reward
trl eval --model_name_or_path qwen-sft --dataset_name chats.jsonl --perplexity
trl eval --model_name_or_path qwen-sft --benchmarks gsm8k ifeval --chat
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trl.cli.commands import MODEL
from trl.cli.evaluation.arguments import EvalArguments
from trl.cli.fields import Option, aliases_in_source, merge_options, options_in_source
from trl.cli.parser import OptionParser, ParsedOptions
from trl.errors import ConfigError, DataError

EVAL = "trl.cli.evaluation.arguments:EvalArguments"
TRAINED = ("use_peft", "lora_", "use_rslora", "use_dora")
SUMMARY = "Samples, rewards, perplexity and benchmarks of a model, and how often it wins against another one."
WORDS = (
    "--model_name_or_path qwen-sft --dataset_name prompts.jsonl --reward_funcs rewards.py:short",
    "--model_name_or_path qwen-dpo --against qwen-sft --dataset_name prompts.jsonl --reward_funcs ./qwen-reward",
    "--model_name_or_path qwen-sft --dataset_name chats.jsonl --perplexity",
    "--model_name_or_path qwen-sft --benchmarks gsm8k ifeval --chat",
)


def options() -> list[Option]:
    found = merge_options(options_in_source(EVAL), options_in_source(MODEL))
    kept = [option for option in found if not option.name.startswith(TRAINED)]
    return [replace(option, default="auto") if option.name == "dtype" else option for option in kept]


def run(words: Sequence[str]) -> int:
    parsed = OptionParser(options(), aliases_in_source(MODEL)).parse(words)
    if parsed.help:
        from trl.cli.help import print_options

        examples = [f"trl eval {each}" for each in WORDS]
        print_options("trl eval", SUMMARY, options(), everything=parsed.help == "all", examples=examples)
        return 0
    os.environ.update(parsed.environment)
    arguments = parsed.arguments_for(EvalArguments)
    results = evaluate(parsed, arguments)
    folder = Path(arguments.output_dir).expanduser()
    told = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in results.items()}
    (folder / "eval.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    print(f"The numbers are in {folder / 'eval.json'}.")
    return 0


def evaluate(parsed: ParsedOptions, arguments: EvalArguments) -> dict[str, Any]:
    """All that was asked for, by name. Raises ConfigError, DataError."""
    if arguments.dataset_name is None and arguments.benchmarks is None:
        raise ConfigError("--dataset_name is missing: rows to evaluate on. Or name --benchmarks.")
    rows = None if arguments.dataset_name is None else read_rows(arguments)
    Path(arguments.output_dir).expanduser().mkdir(parents=True, exist_ok=True)
    from trl.cli.evaluation.loading import load

    model, tokenizer = load(parsed, parsed.values.get("model_name_or_path"))
    results = benchmarks(model, tokenizer, arguments) if arguments.benchmarks else {}
    if rows is None:
        return results
    if arguments.perplexity:
        return {**results, "perplexity": perplexity(model, tokenizer, rows, arguments)}
    return {**results, **compare_samples(parsed, arguments, rows, model, tokenizer)}


def benchmarks(model: Any, tokenizer: Any, arguments: EvalArguments) -> dict[str, Any]:
    """Metrics of the benchmarks that were named."""
    from trl.evaluation.benchmarks import run_benchmarks

    return run_benchmarks(
        model,
        tokenizer,
        arguments.benchmarks or [],
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        tasks_folder=arguments.benchmarks_folder,
        chat=arguments.chat,
        seed=arguments.seed,
    )


def read_rows(arguments: EvalArguments) -> Any:
    """The rows, as a dataset."""
    from trl.data.sources import ScriptArguments, load_dataset_argument

    splits = load_dataset_argument(ScriptArguments(dataset_name=arguments.dataset_name))
    split = arguments.dataset_split
    if split not in splits and list(splits) == ["train"]:
        print("The dataset has the split 'train' alone: its rows are taken.")
        split = "train"
    if split not in splits:
        raise DataError(
            f"The dataset has no split {split!r}: it has {', '.join(splits)}. Name one with --dataset_split."
        )
    rows = splits[split]
    return rows if arguments.limit is None else rows.select(range(min(arguments.limit, len(rows))))


def perplexity(model: Any, tokenizer: Any, rows: Any, arguments: EvalArguments) -> float:
    """exp of the mean loss of the tokens that SFT would train on."""
    from trl.trainers.sft import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_eval_batch_size=arguments.batch_size,
            assistant_only_loss=arguments.assistant_only_loss,
            html_report=False,
            report_to="none",
            max_length=None,
        )
        trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
        return math.exp(trainer.evaluate()["eval_loss"])


def compare_samples(
    parsed: ParsedOptions, arguments: EvalArguments, rows: Any, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Samples in samples.jsonl; their rewards, lengths and wins."""
    from trl.cli.evaluation.loading import load
    from trl.cli.rewards import find_reward
    from trl.evaluation.judges import RewardJudge, ServerJudge
    from trl.evaluation.statistics import estimate

    if "prompt" not in rows.column_names:
        raise DataError(
            f"Samples need a column 'prompt', and the dataset has {rows.column_names}. For texts: --perplexity."
        )
    table = rows.to_dict()
    prompts = table.pop("prompt")
    columns = {name: values for name, values in table.items() if name not in ("completion", "chosen", "rejected")}
    kept: dict[str, Sequence[Any]] = {"prompt": prompts, "completion": _samples(model, tokenizer, prompts, arguments)}
    results: dict[str, Any] = {"characters": estimate([len(_text(each)) for each in kept["completion"]])}
    judge = RewardJudge(list(map(find_reward, arguments.reward_funcs))) if arguments.reward_funcs else None
    if judge is not None:
        kept["reward"] = judge.score(prompts, kept["completion"], **columns)
        results["reward"] = estimate(kept["reward"])
    if arguments.against is not None:
        other = {**parsed.values, "model_name_or_path": arguments.against}
        kept["other"] = _samples(*load(replace(parsed, values=other), arguments.against), prompts, arguments)
        decide = judge if arguments.judge_server is None else ServerJudge(arguments.judge_server, arguments.judge_model)
        kept["win"] = decide(prompts, kept["completion"], kept["other"])
        results["win rate"] = estimate(kept["win"])
    path = Path(arguments.output_dir).expanduser() / "samples.jsonl"
    lines = (dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True))
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return results


def _samples(model: Any, tokenizer: Any, prompts: Sequence[Any], arguments: EvalArguments) -> list[Any]:
    from trl.evaluation.samples import sample

    return sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


def _text(content: Any) -> str:
    from trl.evaluation.judges import plain

    return plain(content)
