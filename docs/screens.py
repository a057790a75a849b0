"""Pictures of the command for these pages, from real runs.

    python docs/screens.py          the report's picture needs chromium

A tiny model learns sums from scratch, and `rich` draws what the commands print.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text
from transformers import TrainerCallback

PLACE = Path(__file__).parent / "screens"
COLUMNS = 104
PAGE = (1000, 1150)
"""Pixels of the report's picture."""

HALFWAY = 540
"""The step of which the picture of a run under way is taken."""

PROMPT = Text.assemble(("$ ", "bright_black"))

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
YAML = """
model_name_or_path: tiny
dataset_name: sums.jsonl
output_dir: sums
assistant_only_loss: true
learning_rate: 3e-3
lr_scheduler_type: cosine
per_device_train_batch_size: 16
num_train_epochs: 40
logging_steps: 10
save_strategy: "no"
report_to: none
"""


def recording() -> Console:
    """A console that remembers what it prints, and shows it to nobody."""
    return Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )


def draw(console: Console, name: str) -> None:
    """Write what a console has printed as SVG."""
    drawn = console.export_svg(title="", unique_id=name)
    (PLACE / f"{name}.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL))


def picture(name: str, command: str, *shown: RenderableType) -> None:
    console = recording()
    console.print(Text.assemble(PROMPT, command), *shown, sep="\n", soft_wrap=True)
    draw(console, name)


# ---- the pictures ----


def check(folder: Path) -> None:
    command = "trl check sft --config sft.yaml"
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    picture("check", command, Text.from_ansi(done.stdout.rstrip()))


def training(folder: Path) -> None:
    from trl.callbacks.progress import RichProgressCallback
    from trl.cli.commands import methods
    from trl.cli.train import build_trainer, read_run

    command, told = "trl sft --config sft.yaml", Told()
    logging.getLogger("trl").addHandler(told)
    logging.getLogger("trl").setLevel(logging.INFO)
    with chdir(folder):
        method = methods()["sft"]
        trainer = build_trainer(read_run(method, method.parser().parse(["--config", "sft.yaml"])))
        bars = RichProgressCallback(Console(file=io.StringIO(), force_terminal=True, width=COLUMNS))
        before = Snapshot(lambda: picture("training", command, *told.lines, *bars.bars.get_renderables()))
        trainer.add_callback(bars)
        trainer.add_callback(before)
        trainer.train()
        trainer.save_model("sums")
    last = Text("The model is in sums.")
    picture("trained", command, *told.lines, *bars.bars.get_renderables(), last)


class Told(logging.Handler):
    """What the library reports, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Text] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(Text(self.format(record)))


class Snapshot(TrainerCallback):
    """Takes a picture once, half-way."""

    def __init__(self, take: Callable[[], None]) -> None:
        self.take = take

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == HALFWAY:
            self.take()


def chat(folder: Path) -> None:
    from trl.cli.chat.arguments import EXAMPLES, ChatArguments, generation_of
    from trl.cli.chat.local import load_speaker
    from trl.cli.chat.screen import USER, Screen
    from trl.cli.chat.session import Session
    from trl.models.config import ModelConfig

    lines = iter(("What is 4 + 7?", "set temperature=0.2; max_new_tokens=40", "And 12 + 9?", "save sums"))

    class Typed(Screen):
        """A screen whose lines are typed already."""

        def __init__(self) -> None:
            super().__init__()
            self.out = self.aside = recording()
            self.talks = True
            self.out.status = Console(file=io.StringIO()).status  # a spinner would leave its frames in the picture

        def ask(self, user: str) -> str:
            line = next(lines, "exit")
            self.out.print(Text.assemble((f"\n{user} › ", USER), line))
            return line

    screen, arguments = Typed(), ChatArguments(seed=1)
    screen.out.print(Text.assemble(PROMPT, "trl chat --model_name_or_path sums --user you --seed 1"))
    with chdir(folder):
        speaker = load_speaker(arguments, ModelConfig(model_name_or_path="sums", dtype="auto"))
        session = Session(
            speaker, generation_of(arguments), screen, user="you", examples=EXAMPLES, save_folder="chat_history"
        )
        session.run()
    draw(screen.out, "chat")


def report(folder: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise RuntimeError("The report's picture needs chromium.")
    size = ",".join(map(str, PAGE))
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1"]
    page = (folder / "sums" / "report.html").as_uri()
    picture = f"--screenshot={PLACE / 'report.png'}"
    subprocess.run([browser, *options, f"--window-size={size}", picture, page], check=True, capture_output=True)


# ---- what they show ----


def prepare(folder: Path) -> None:
    """A tiny random model, its tokenizer, and sums as conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    sums = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    others = [Random(seed).sample(sums, len(sums)) for seed in range(3)]
    chats = [
        _turn("What is", *first) + _turn("And", *then)
        for shuffled in others
        for first, then in zip(sums, shuffled, strict=True)
    ]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (folder / "sft.yaml").write_text(YAML)
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (message["content"] for chat in chats for message in chat)
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tiny")
    set_seed(0)
    widths = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None, pad_token_id=0, **widths)
    config.max_position_embeddings = 512
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")


def _turn(question: str, a: int, b: int) -> list[dict[str, str]]:
    asked, said = f"{question} {a} + {b}?", f"{a} + {b} is {a + b}."
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


PICTURES: tuple[Callable[[Path], None], ...] = (check, training, chat, report)


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for draw in PICTURES:
            draw(folder)
            print(draw.__name__, flush=True)


if __name__ == "__main__":
    main()
