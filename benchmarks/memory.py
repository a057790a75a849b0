"""How near `trl check`'s estimate of memory comes to what training takes: a table over architectures, methods, options.

    python benchmarks/memory.py

Every run trains for a few steps in a process of its own. Measured is the most memory that the process ever held (VmHWM of
Linux), and what of it came after its libraries were imported. The estimate is of what is alive; an allocator holds more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20

SHAPES = {
    "llama-tiny": ("LlamaForCausalLM", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}),
    "gpt2-tiny": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama-15m": ("LlamaForCausalLM", {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}),
    "gpt2-15m": ("GPT2LMHeadModel", {"n_embd": 384, "n_layer": 6, "n_head": 6}),
}
VOCABULARY = {"llama-tiny": 1000, "gpt2-tiny": 1000, "llama-15m": 8000, "gpt2-15m": 8000}

LORA = "--use_peft --lora_target_modules all-linear"
SAMPLED = "--reward_funcs rewards.py:long --max_completion_length 128 --num_generations 8"
RUNS = {
    "sft": "sft",
    "sft checkpointed": "sft --gradient_checkpointing",
    "sft LoRA": f"sft {LORA}",
    "sft LoRA checkpointed": f"sft {LORA} --gradient_checkpointing",
    "sft accumulated": "sft --per_device_train_batch_size 2 --gradient_accumulation_steps 4",
    "dpo": "dpo",
    "dpo LoRA": f"dpo {LORA}",
    "grpo": f"grpo {SAMPLED} --gradient_accumulation_steps 4",
}

COMMON = "--use_cpu --max_steps 4 --save_strategy no --report_to none --no_html_report"


@dataclass(frozen=True)
class Comparison:
    """Bytes: of the whole process, and of what came after its libraries."""

    estimated: float
    measured: float
    estimated_after: float
    measured_after: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured

    @property
    def ratio_after(self) -> float:
        return self.estimated_after / self.measured_after


def compare(shape: str, options: str, folder: Path) -> Comparison:
    """Estimated and measured bytes of a few steps on rows of 256 tokens."""
    make_model(shape, folder)
    method, *more = options.split()
    words = [method, "--model_name_or_path", shape, "--dataset_name", f"{method}.jsonl", "--output_dir", "out"]
    words += [*COMMON.split(), *more]
    estimated, measured = (_in_process(what, words, folder) for what in ("estimate", "measure"))
    return Comparison(estimated["peak"], measured["peak"], estimated["after"], measured["after"])


def make_model(shape: str, folder: Path) -> None:
    """A random model of that shape with a tokenizer of digits, and rows of 256 tokens for every method."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    name, widths = SHAPES[shape]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    cls = getattr(transformers, name)
    heads = {} if name.startswith("GPT2") else {"num_attention_heads": 4, "num_key_value_heads": 4}
    cls(cls.config_class(vocab_size=VOCABULARY[shape], **widths, **heads, **special)).save_pretrained(folder / shape)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(500))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / shape)

    def digits(start: int, count: int) -> str:
        return " ".join(str((7 * start + j) % 500) for j in range(count))

    rows = {
        "sft": [{"text": digits(i, 255)} for i in range(48)],
        "dpo": [
            {"prompt": digits(i, 128), "chosen": digits(i, 127), "rejected": digits(i + 1, 127)} for i in range(48)
        ],
        "grpo": [{"prompt": digits(i, 128)} for i in range(48)],
    }
    for method, each in rows.items():
        (folder / f"{method}.jsonl").write_text("\n".join(map(json.dumps, each)))
    (folder / "rewards.py").write_text("def long(completions, **_):\n    return [float(len(c)) for c in completions]\n")


def _in_process(what: str, words: list[str], folder: Path) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).resolve()), what, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def estimate(words: list[str]) -> dict[str, int]:
    from trl.cli.check import estimate_of, trainer_of
    from trl.cli.estimate import LIBRARIES, with_sampling
    from trl.cli.train import datasets_of

    run = _run(words)
    trainer = trainer_of(run, datasets_of(run)[0])
    found = with_sampling(estimate_of(run, trainer), trainer)
    return {"peak": found.total, "after": found.total - found.parts[LIBRARIES]}


def measure(words: list[str]) -> dict[str, int]:
    from trl.cli.commands import load
    from trl.cli.train import build_trainer

    run = _run(words)
    load(run.method.trainer)
    before = _resident("VmRSS")
    build_trainer(run).train()
    return {"peak": _resident("VmHWM"), "after": _resident("VmHWM") - before}


def _run(words: list[str]):
    from trl.cli.commands import methods
    from trl.cli.train import read_run

    os.environ["TQDM_DISABLE"] = "1"
    method = methods()[words[0]]
    return read_run(method, method.parser().parse(words[1:]))


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    chosen = parser.parse_args()
    print(f"{'':36} {'whole process':>24}   {'beyond its libraries':>24}   (MiB)")
    print(f"{'model':<12} {'run':<23} {'estimate':>8} {'measured':>8} {'ratio':>6}", end=" ")
    print(f"  {'estimate':>8} {'measured':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in chosen.shapes:
            for name in chosen.runs:
                found = compare(shape, RUNS[name], Path(folder))
                whole = f"{found.estimated / MIB:>8.0f} {found.measured / MIB:>8.0f} {found.ratio:>6.2f}"
                after = (
                    f"{found.estimated_after / MIB:>8.0f} {found.measured_after / MIB:>8.0f} {found.ratio_after:>6.2f}"
                )
                print(f"{shape:<12} {name:<23} {whole}   {after}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] in (["estimate"], ["measure"]):
        print(json.dumps({"estimate": estimate, "measure": measure}[sys.argv[1]](sys.argv[2:])))
    else:
        main()
