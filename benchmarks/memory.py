"""How near `trl check`'s estimate of memory comes to what training takes: a table over architectures and options.

    python benchmarks/memory.py

Every run trains for a few steps in a process of its own. Measured is by how much its resident memory grew beyond what it
held before it had a model (VmHWM of Linux).
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

OPTIONS = {
    "sft": "",
    "sft checkpointed": "--gradient_checkpointing",
    "sft LoRA": "--use_peft --lora_target_modules all-linear",
    "sft LoRA checkpointed": "--use_peft --lora_target_modules all-linear --gradient_checkpointing",
    "sft accumulated": "--per_device_train_batch_size 2 --gradient_accumulation_steps 4",
}


@dataclass(frozen=True)
class Comparison:
    estimated: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured


def compare(shape: str, options: str, folder: Path) -> Comparison:
    """Estimated and measured bytes of a few steps of `trl sft` on rows of 256 tokens."""
    make_model(shape, folder)
    words = ["--model_name_or_path", str(folder / shape), "--dataset_name", str(folder / "rows.jsonl"), "--use_cpu"]
    words += ["--max_steps", "4", "--save_strategy", "no", "--report_to", "none", "--output_dir", str(folder / "out")]
    words += options.split()
    return Comparison(*(_in_process(what, words) for what in ("estimate", "measure")))


def make_model(shape: str, folder: Path) -> None:
    """A random model of that shape with a tokenizer of digits, and rows of 256 tokens."""
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
    rows = [{"text": " ".join(str((7 * i + j) % 500) for j in range(255))} for i in range(48)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _in_process(what: str, words: list[str]) -> float:
    command = [sys.executable, __file__, what, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def estimate(words: list[str]) -> int:
    from trl.cli.estimate import estimate_memory
    from trl.cli.preview import trainer_without_weights
    from trl.models.config import get_peft_config

    run = _run(words)
    return estimate_memory(trainer_without_weights(run, peft_config=get_peft_config(run.model))).total


def measure(words: list[str]) -> int:
    from trl.cli.commands import load
    from trl.cli.train import build_trainer

    run = _run(words)
    load(run.method.trainer)
    before = _resident("VmRSS")
    build_trainer(run).train()
    return _resident("VmHWM") - before


def _run(words: list[str]):
    from trl.cli.commands import methods
    from trl.cli.train import read_run

    os.environ["TQDM_DISABLE"] = "1"
    method = methods()["sft"]
    return read_run(method, method.parser().parse(words))


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    shapes = parser.parse_args().shapes
    print(f"{'model':<12} {'run':<24} {'estimated':>10} {'measured':>10} {'ratio':>6}   (MiB)")
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            for name, options in OPTIONS.items():
                found = compare(shape, options, Path(folder))
                numbers = f"{found.estimated / MIB:>10.0f} {found.measured / MIB:>10.0f} {found.ratio:>6.2f}"
                print(f"{shape:<12} {name:<24} {numbers}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] in (["estimate"], ["measure"]):
        print({"estimate": estimate, "measure": measure}[sys.argv[1]](sys.argv[2:]))
    else:
        main()
