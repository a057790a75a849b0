"""What the command says to inputs that cannot work: a table of commands, and the words with which each ends.

    python benchmarks/bad_inputs.py            all of them, as a table in Markdown

Every command must end with a status above 0 and a message that names what was given and what to do; none may end with a
traceback, or with a warning of another library's. `tests/cli/test_cli_bad_inputs.py` holds the table to that.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

BASE = "--model_name_or_path tiny --use_cpu --report_to none --no_html_report"
DATA = "--dataset_name rows.jsonl"
REWARDED = "--dataset_name prompts.jsonl --reward_funcs rewards.py:short"


@dataclass(frozen=True)
class Trial:
    """A command line without `trl`, what its message must name, and files that are written beforehand."""

    words: str
    names: tuple[str, ...]
    files: tuple[tuple[str, str | bytes], ...] = ()


AXOLOTL = "base_model: tiny\nmicro_batch_size: 2\nsequence_len: 64\nnum_epochs: 1\nadapter: lora\nstrict: false\n"
LLAMA_FACTORY = "model_name_or_path: tiny\nstage: sft\nfinetuning_type: lora\ncutoff_len: 64\ndataset: rows.jsonl\noutput_dir: out\n"
MISTAKES = "lerning_rate: 1\nmax_length: many\nlogging_steps: 5\npackings: true\n"
TEXT_KEYS = json.dumps({"messages": [{"role": "user", "text": "Why?"}, {"role": "assistant", "text": "So."}]}) + "\n"
EMPTY_CHAT = json.dumps({"messages": []}) + "\n"
LATIN = '{"text": "naïve"}\n'.encode("latin-1")

TRIALS = (
    # words that others use
    Trial(f"sft {BASE} {DATA} --lr 1e-4", ("--lr", "--learning_rate")),
    Trial(f"sft {BASE} {DATA} --batch_size 4", ("--batch_size", "--per_device_train_batch_size")),
    Trial(f"sft --model tiny {DATA}", ("--model", "--model_name_or_path")),
    Trial(f"sft {BASE} --dataset rows.jsonl", ("--dataset", "--dataset_name")),
    Trial(f"sft {BASE} {DATA} --epochs 3", ("--epochs", "--num_train_epochs")),
    Trial(f"sft {BASE} {DATA} --lora", ("--lora", "--use_peft")),
    Trial(f"sft {BASE} {DATA} --lerning_rate 1", ("--lerning_rate", "--learning_rate")),
    Trial(f"sft {BASE} {DATA} learning_rate 1", ("'learning_rate'", "two dashes")),
    Trial("stf", ("'stf'", "'sft'")),
    # files
    Trial("sft --config axolotl.yaml", ("axolotl", "model_name_or_path", "leave it out"), (("axolotl.yaml", AXOLOTL),)),
    Trial("sft --config factory.yaml", ("LLaMA-Factory", "max_length", "use_peft"), (("factory.yaml", LLAMA_FACTORY),)),
    Trial("sft --config bad.yaml", ("3 mistakes", "learning_rate", "'many'", "packing"), (("bad.yaml", MISTAKES),)),
    Trial("sft --config none.yaml", ("none.yaml", "no such file")),
    Trial("sft --config odd.yaml", ("odd.yaml", "UTF-8"), (("odd.yaml", "# naïve".encode("latin-1")),)),
    Trial("sft --config list.yaml", ("list.yaml", "list"), (("list.yaml", "- a\n- b\n"),)),
    # values and what does not go together
    Trial(f"sft {BASE} {DATA} --learning_rate fast", ("--learning_rate", "'fast'", "float")),
    Trial(f"sft {BASE} {DATA} --learning_rate nan", ("learning_rate", "nan")),
    Trial(f"sft {BASE} {DATA} --bf16 --fp16", ("bf16", "fp16", "one of them")),
    Trial(f"sft {BASE} {DATA} --fp16", ("fp16", "CPU", "bf16")),
    Trial(f"sft {BASE} {DATA} --tf32", ("tf32", "leave it out")),
    Trial(f"sft {BASE} {DATA} --logging_steps 0", ("logging_steps", "0", "--logging_strategy no")),
    Trial(f"sft {BASE} {DATA} --warmup_ratio 3", ("warmup_ratio", "3", "warmup_steps")),
    Trial(f"sft {BASE} {DATA} --num_train_epochs -1", ("num_train_epochs", "-1")),
    Trial(f"sft {BASE} {DATA} --per_device_train_batch_size 0", ("per_device_train_batch_size", "0")),
    Trial(f"sft {BASE} {DATA} --gradient_accumulation_steps 0", ("gradient_accumulation_steps", "0")),
    Trial(f"sft {BASE} {DATA} --loss_type nlll", ("'nlll'", "'nll'")),
    Trial(f"sft {BASE} {DATA} --optim adam", ("optim", "'adam'", "adamw")),
    Trial(f"sft {BASE} {DATA} --eval_strategy steps", ("eval_strategy", "test_split")),
    Trial(f"sft {BASE} {DATA} --enable_jit_checkpoint", ("enable_jit_checkpoint", "leave it out")),
    Trial(f"sft {BASE} {DATA} --save_safetensors false", ("save_safetensors", "safetensors")),
    Trial(f"sft {BASE} {DATA} --report_to wandbb", ("report_to", "wandbb")),
    Trial(f"sft {BASE} {DATA} --load_in_4bit --load_in_8bit", ("load_in_4bit", "load_in_8bit", "keep one")),
    Trial(
        f"sft {BASE} {DATA} --save_strategy best", ("save_strategy='best'", "metric_for_best_model", "eval_strategy")
    ),
    Trial(
        f"sft {BASE} {DATA} --load_best_model_at_end",
        ("load_best_model_at_end", "eval_strategy is 'no'", "--eval_strategy epoch --save_strategy epoch"),
    ),
    Trial(f"sft {BASE} {DATA} --load_in_4bit", ("--load_in_4bit", "--use_peft")),
    Trial(f"sft {BASE} {DATA} -o out", ("'-o'", "two dashes")),
    Trial(f"dpo {BASE} --dataset_name pairs.jsonl --beta -1", ("beta", "-1")),
    # rows
    Trial(f"sft {BASE} --dataset_name none.jsonl", ("none.jsonl", "rows.jsonl")),
    Trial(f"sft {BASE} --dataset_name latin.jsonl", ("latin.jsonl", "UTF-8", "line 1"), (("latin.jsonl", LATIN),)),
    Trial(f"sft {BASE} --dataset_name empty.jsonl", ("empty.jsonl", "no rows"), (("empty.jsonl", ""),)),
    Trial(f"sft {BASE} --dataset_name chats.jsonl", ("messages", "empty"), (("chats.jsonl", EMPTY_CHAT),)),
    Trial(
        f"sft {BASE} --dataset_name keys.jsonl",
        ("line 1 of keys.jsonl", "message 1", "(user)", "'text'", "'content'"),
        (("keys.jsonl", TEXT_KEYS),),
    ),
    Trial(
        f"sft {BASE} --dataset_name cut.jsonl",
        ("cut.jsonl", "line 2"),
        (("cut.jsonl", '{"text": "a"}\n{"text": "b\n'),),
    ),
    Trial(f"dpo {BASE} {DATA}", ("text", "chosen", "rejected")),
    Trial(f"sft {BASE} --dataset_name tiny", ("'tiny'", "cannot be read as rows", "holds a model")),
    Trial(f"sft {BASE} --dataset_name bare", ("'bare'", "no data files", ".jsonl"), (("bare/notes.md", "none"),)),
    Trial(f"preview {BASE} {DATA} --rows -1", ("rows=-1", "1 or more")),
    # models, folders, networks
    Trial("chat tiny", ("'tiny'", "--model_name_or_path tiny")),
    Trial("chat --model_name_or_path tiny --device mps", ("device='mps'", "does not exist on this machine")),
    Trial("chat --model_name_or_path no-such-model", ("no-such-model", "offline")),
    Trial(f"eval --model_name_or_path no-such-model {DATA} --perplexity", ("no-such-model", "offline")),
    Trial(f"sft --model_name_or_path ./nowhere {DATA}", ("./nowhere", "no such folder")),
    Trial(f"sft --model_name_or_path no-such-model {DATA} --use_cpu", ("no-such-model", "offline")),
    Trial(f"sft {BASE} --dataset_name no-such/data", ("no-such/data", "Hub")),
    Trial(f"sft {BASE} {DATA} --attn_implementation flash_attention_2", ("attn_implementation", "flash-attn,", "sdpa")),
    Trial(f"check {BASE} {DATA} --attn_implementation spda", ("'spda'", "'sdpa'", "flex_attention")),
    Trial(f"sft {BASE} {DATA} --lora_r 8 --use_dora", ("--lora_r", "--use_peft", "--use_dora")),
    Trial(
        f"sft {BASE} {DATA} --use_peft --lora_target_modules query --use_cpu",
        ("target_modules=['query']", "q_proj", "all-linear"),
    ),
    Trial(f"sft {BASE} {DATA} --output_dir rows.jsonl", ("output_dir", "rows.jsonl")),
    Trial(f"sft {BASE} {DATA} --output_dir out --push_to_hub --max_steps 1", ("push_to_hub", "hf auth login")),
    Trial(f"sft {BASE} {DATA} --resume_from_checkpoint gone", ("gone", "no such folder")),
    Trial(f"grpo {BASE} --dataset_name prompts.jsonl --reward_funcs rewards.py:shrt", ("shrt", "short")),
    Trial(f"grpo {BASE} --dataset_name prompts.jsonl", ("--reward_funcs", "file.py:function")),
    Trial(
        f"grpo {BASE} {REWARDED} --reward_weights 1 2",
        ("reward_weights", "2 values for 1 reward function ", "rewards.py:short"),
    ),
    Trial(f"grpo {BASE} {REWARDED} --use_vllm", ("use_vllm", 'pip install "trl[vllm]"', "trl serve")),
    Trial(f"grpo {BASE} --dataset_name prompts.jsonl --reward_funcs tiny", ("'tiny'", "language model", "trl reward")),
    Trial(
        f"grpo {BASE} --dataset_name prompts.jsonl --reward_funcs broken.py:short",
        ("broken.py:short", "SyntaxError", "line 1"),
        (("broken.py", "def short(:\n"),),
    ),
    Trial(
        f"grpo {BASE} --dataset_name prompts.jsonl --reward_funcs lacks.py:short",
        ("lacks.py:short", "No module named 'no_such_package'", "line 2"),
        (("lacks.py", "import json\nimport no_such_package\n"),),
    ),
    Trial(f"sft {BASE} {DATA} --output_dir empty --resume_from_checkpoint true", ("'empty'", "no checkpoint")),
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, and all that it wrote to standard error."""

    status: int
    told: str


def prepare(folder: Path, save_model: Callable[[Path], None]) -> None:
    """Files that the commands name: a tiny model, rows, and rewards."""
    save_model(folder / "tiny")
    texts = [{"text": f"What is {i}? It is {i}."} for i in range(8)]
    pairs = [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}] * 8
    for name, rows in (("rows", texts), ("pairs", pairs), ("prompts", [{"prompt": "Why?"}] * 8)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "rewards.py").write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")


def run(trial: Trial, folder: Path) -> Outcome:
    """Run a trial in `folder`, offline."""
    from trl.cli.main import main

    for name, content in trial.files:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    out, errors = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(errors):
        status = main(trial.words.split())
    return Outcome(status, errors.getvalue())


def message(outcome: Outcome) -> str:
    """The error that a command ended with, without the lines before it."""
    return outcome.told[outcome.told.find("trl: error:") :].strip() if "trl: error:" in outcome.told else "(none)"


def save_tiny_model(folder: Path) -> None:
    """A random Llama of 30,000 parameters, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **widths)).save_pretrained(folder)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, save_tiny_model)
        print("| command | status | words |\n|---|---|---|")
        for trial in TRIALS:
            outcome = run(trial, folder)
            said = message(outcome).replace("\n", "<br>").replace("|", "\\|").replace(place, "…")
            print(f"| `trl {trial.words}` | {outcome.status} | {said} |", flush=True)


if __name__ == "__main__":
    main()
