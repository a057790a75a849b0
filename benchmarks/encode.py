"""Rows per second of encoding a dataset, side by side with another library in an environment of its own.

    python benchmarks/encode.py --trl-python /path/to/venv/bin/python

The rows, the tokenizer and the chat template are the same. Every measurement is a process of its own; the two sides
take turns, and medians are printed. The other side is timed where its trainer prepares a dataset.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MAX_LENGTH = 512


def words(count: int, rng: random.Random) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"] + ["th", "st", "ing", "er", "on", "qu"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)})


class Writer:
    """Text of words whose frequencies follow Zipf's law."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        vocabulary = words(30_000, rng)
        rng.shuffle(vocabulary)
        weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
        self.pool = rng.choices(vocabulary, weights, k=1_000_000)

    def text(self, length: int) -> str:
        start = self.rng.randrange(len(self.pool) - length)
        return " ".join(self.pool[start : start + length]) + "."

    def turns(self, length: int, count: int) -> list[dict[str, str]]:
        question, answer = max(3, length // (3 * count)), max(3, 2 * length // (3 * count))
        turn = lambda role, n: {"role": role, "content": self.text(n)}  # noqa: E731
        return [m for _ in range(count) for m in (turn("user", question), turn("assistant", answer))]

    def length(self) -> int:
        return min(800, max(10, int(self.rng.lognormvariate(4.6, 0.7))))


def chats(writer: Writer, rows: int) -> list[dict[str, Any]]:
    return [{"messages": writer.turns(writer.length(), writer.rng.randint(1, 3))} for _ in range(rows)]


def preferences(writer: Writer, rows: int) -> list[dict[str, Any]]:
    answer = lambda: [{"role": "assistant", "content": writer.text(40)}]  # noqa: E731
    prompt = lambda: [{"role": "user", "content": writer.text(min(200, writer.length()))}]  # noqa: E731
    return [{"prompt": prompt(), "chosen": answer(), "rejected": answer()} for _ in range(rows)]


WORKLOADS: dict[str, tuple[Callable[[Writer, int], list[dict[str, Any]]], dict[str, Any]]] = {
    "chats": (chats, {}),
    "chats, assistant only": (chats, {"assistant_only_loss": True}),
    "preferences": (preferences, {}),
}


def write_data(folder: Path, rows: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    writer = Writer(random.Random(0))
    for name, (make, _) in WORKLOADS.items():
        (folder / f"{name}.json").write_text(json.dumps(make(writer, rows if make is chats else rows // 2)))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(
        (" ".join(writer.pool[i : i + 1000]) for i in range(0, len(writer.pool), 1000)), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def encode_here(rows: list[dict[str, Any]], tokenizer: Any, options: dict[str, Any]) -> float:
    from datasets import Dataset

    from trl.data.encode import EncodeSettings, encode_dataset

    settings = EncodeSettings(max_length=MAX_LENGTH, **options)
    dataset = Dataset.from_list(rows)
    start = time.perf_counter()
    encode_dataset(dataset, tokenizer, settings=settings)
    return time.perf_counter() - start


def encode_unmarked(rows: list[dict[str, Any]], tokenizer: Any, options: dict[str, Any]) -> float:
    tokenizer.chat_template = UNMARKED
    return encode_here(rows, tokenizer, options)


def encode_there(rows: list[dict[str, Any]], tokenizer: Any, options: dict[str, Any]) -> float:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    import trl

    seconds = []

    def timed(trainer: type) -> type:
        class Timed(trainer):
            def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                prepared = super()._prepare_dataset(*args, **kwargs)
                seconds.append(time.perf_counter() - start)
                return prepared

        return Timed

    trainer, config = ("DPOTrainer", "DPOConfig") if "chosen" in rows[0] else ("SFTTrainer", "SFTConfig")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, config)(folder, max_length=MAX_LENGTH, use_cpu=True, bf16=False, report_to=[], **options)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
        reference = {"ref_model": copy.deepcopy(model)} if "chosen" in rows[0] else {}
        dataset = Dataset.from_list(rows)
        trainer = timed(getattr(trl, trainer))
        trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **reference)
    return sum(seconds)


def tokenize_only(rows: list[dict[str, Any]], tokenizer: Any, options: dict[str, Any]) -> float:
    key = "messages" if "messages" in rows[0] else "prompt"
    texts = ["".join(message["content"] for message in row[key]) for row in rows]
    start = time.perf_counter()
    tokenizer(texts)
    return time.perf_counter() - start


SIDES = {"here": encode_here, "here, no marks": encode_unmarked, "there": encode_there, "tokenizer": tokenize_only}


def work(folder: Path, workload: str, side: str) -> None:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    rows = json.loads((folder / f"{workload}.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    seconds = SIDES[side](rows, tokenizer, WORKLOADS[workload][1])
    print(json.dumps({"rows": len(rows), "seconds": seconds}))


def measure(python: str, folder: Path, workload: str, side: str) -> float:
    """Rows per second of one process."""
    command = [python, __file__, "--worker", side, "--workload", workload, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if output.returncode:
        raise SystemExit(f"{side} failed on {workload!r}:\n{output.stderr[-3000:]}")
    result = json.loads(output.stdout.strip().splitlines()[-1])
    return result["rows"] / result["seconds"]


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    results = []
    for workload, (_, options) in WORKLOADS.items():
        sides = [side for side in SIDES if side != "here, no marks" or options]
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side in sides:
                python = args.trl_python if side == "there" else sys.executable
                speeds[side].append(measure(python, folder, workload, side))
        medians = {side: statistics.median(values) for side, values in speeds.items()}
        results.append({"workload": workload, "rows_per_second": medians, "all": speeds})
        report(results[-1])
    return results


def report(result: dict[str, Any]) -> None:
    there = result["rows_per_second"]["there"]
    for side, speed in result["rows_per_second"].items():
        print(f"{result['workload']:24} {side:16} {speed:10,.0f} rows/s {speed / there:6.2f}×", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of the environment with the other library")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.folder, args.workload, args.worker)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.rows)
        results = compare(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return None


if __name__ == "__main__":
    main()
