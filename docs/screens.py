"""Pictures of the command for these pages, from real runs.

    pip install pyte;  python docs/screens.py          the report's picture needs chromium

A tiny model learns sums from scratch. Each command runs in a pseudo-terminal; what stands on its screen is written as SVG.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pyte
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

PLACE = Path(__file__).parent / "screens"
COLUMNS, LINES, PATIENCE = 104, 70, 300
PAGE = (1000, 1150)
"""Pixels of the report's picture."""

PROMPT = Text.assemble(("$ ", "bright_black"))
FAINT = re.compile(r"\x1b\[((?:1;)?)2((?:;[\d;]+)?)m")
"""Faint letters, which the emulator does not know: they are shown in grey."""

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


class Terminal:
    """A command in a pseudo-terminal, and what stands on its screen."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command = command
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream, self.decode = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")().decode
        self.process, self.master = _in_terminal(command, folder)

    def wait_for(self, pattern: str) -> None:
        """Read until the screen matches `pattern`."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, "\n".join(self.screen.display)):
            if not self._read(end - time.monotonic()):
                raise RuntimeError(f"{pattern!r} did not come:\n" + "\n".join(self.screen.display))

    def wait(self) -> None:
        while self._read(PATIENCE):
            pass
        if self.process.wait(timeout=PATIENCE):
            raise RuntimeError("\n".join(self.screen.display))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # what Linux says at the end
            return False
        self.stream.feed(FAINT.sub("\x1b[\\g<1>90\\g<2>m", self.decode(data)))
        return bool(data)

    def picture(self, name: str) -> None:
        """Write the screen as SVG."""
        lines = [self._line(i) for i in range(LINES)]
        while lines and not lines[-1].plain.strip():
            lines.pop()
        text = Text("\n").join([Text.assemble(PROMPT, self.command), *lines])
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
        console.print(text, soft_wrap=True, highlight=False)
        drawn = console.export_svg(title="", unique_id=name)
        (PLACE / f"{name}.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL))

    def _line(self, row: int) -> Text:
        cells = [self.screen.buffer[row][column] for column in range(COLUMNS)]
        line = Text.assemble(*((cell.data, _style(cell)) for cell in cells))
        line.rstrip()
        return line


def _in_terminal(command: str, folder: Path) -> tuple[subprocess.Popen, int]:
    """`command` with a terminal of its own, and that terminal's other end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    words = [sys.executable, "-m", *command.split()]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=folder,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    return process, master


def _style(cell: pyte.screens.Char) -> Style:
    front, back = _color(cell.fg), _color(cell.bg)
    if cell.reverse:
        front, back = back, front
    return Style(color=front, bgcolor=back, bold=cell.bold, italic=cell.italics, underline=cell.underscore)


def _color(name: str) -> Color | None:
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return Color.parse(f"#{name}")
    return Color.parse(name.replace("brown", "yellow").replace("bright", "bright_"))


# ---- the pictures ----


def check(folder: Path) -> None:
    terminal = Terminal("trl check sft --config sft.yaml", folder)
    terminal.wait()
    terminal.picture("check")


def training(folder: Path) -> None:
    terminal = Terminal("trl sft --config sft.yaml", folder)
    terminal.wait_for(r"\b[5-9]\d\d/1080(?s:.)*loss")
    terminal.picture("training")
    terminal.wait()
    terminal.picture("trained")


def chat(folder: Path) -> None:
    terminal = Terminal("trl chat --model_name_or_path sums --user you --seed 1", folder)
    said = ("What is 4 + 7?", "set temperature=0.2; max_new_tokens=40", "And 12 + 9?", "save sums", "exit")
    for number, words in enumerate(said, 1):
        terminal.wait_for("you ›(?s:.)*" * number)
        terminal.type(f"{words}\n")
    terminal.wait()
    terminal.picture("chat")


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
