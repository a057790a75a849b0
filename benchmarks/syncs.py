"""How often a training step waits for its device, and sends it something, counted on a machine without one.

    python benchmarks/syncs.py [--methods sft,dpo,kto,reward,orpo]

A trainer runs on tensors of PyTorch's device "meta", which have shapes and no data, as on a GPU in half precision: packed
and shared rows attend by one call of variable length, and the head is that of Triton, whose kernels are not run. Whatever
the host reads of such a tensor would make it wait, and is counted by the place that reads; so is every copy of a tensor of
the host. Transformers' loop, the clipping of gradients and a plain optimizer are part of a step; logging is not.
"""

from __future__ import annotations

import argparse
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from datasets import Dataset
from synthetic import completion_rows, model, preference_rows, tokenizer, unpaired_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainingArguments

import trl
from trl.models import varlen
from trl.ops import logprobs, triton_head

META = torch.device("meta")
STEPS = 3
METHODS = {
    "sft": ("SFT", completion_rows),
    "dpo": ("DPO", preference_rows),
    "kto": ("KTO", unpaired_rows),
    "reward": ("Reward", preference_rows),
    "orpo": ("ORPO", preference_rows),
}


class Waits(TorchDispatchMode):
    """Counts, by place, what the host reads of tensors of the device, and what it sends there."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        if name == "_local_scalar_dense" and on_device:
            self.read[place()] += 1
            return 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]) == META
            if on_device and not to_device:
                self.read[place()] += 1
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if to_device and not on_device:
                self.sent[place()] += 1
        return function(*args, **kwargs)


def place() -> str:
    """The innermost functions that are not PyTorch's: file, line, name."""
    frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))


class EachStep(TrainerCallback):
    """What a step counted, from the end of the one before to its own."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.steps = waits, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append((Counter(self.waits.read), Counter(self.waits.sent)))
        self.waits.read.clear()
        self.waits.sent.clear()


class _Attention(torch.autograd.Function):
    """Stands for a call of variable length: shapes of its output and gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


@contextmanager
def on_meta(trainer: Any) -> Iterator[None]:
    """The trainer's device is "meta", with the attention and the head that CUDA would get."""
    autocast, enabled, half = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    known = {"cpu", "cuda"}
    patches = [
        patch.object(TrainingArguments, "device", PropertyMock(return_value=META)),
        patch.object(triton_head, "launch", lambda *_, **__: None),
        patch.object(logprobs, "_implementation", lambda *_: triton_head.TritonLogprobs),
        patch.object(varlen, "_has_kernel", lambda *_: True),
        patch.object(varlen, "varlen_attn", lambda q, k, v, *_, **__: _Attention.apply(q, k, v)),
        patch("torch.autocast", lambda d, *a, **k: autocast(d, *a, **k) if d in known else nullcontext()),
        patch("torch.is_autocast_enabled", lambda d="cpu": enabled(d) if d in known else False),
        patch("torch.get_autocast_dtype", lambda d: half(d) if d in known else torch.bfloat16),
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.callback(setattr, trainer.accelerator.state, "device", torch.device("cpu"))
        trainer.accelerator.state.device = META
        for held in (trainer.model, getattr(getattr(trainer, "reference", None), "model", None)):
            if held is not None:
                varlen.switch(held.to(META), varlen.VARLEN)
        trainer._tr_loss = torch.zeros((), device=META)
        yield


def count(method: str, folder: str) -> tuple[Counter[str], Counter[str], int]:
    """What a step of two micro-batches reads of its device and sends there, by place; and how many micro-batches it has."""
    name, rows = METHODS[method]
    options = {"prompt": (8, 24), "completion": (4, 16)}
    args = getattr(trl, f"{name}Config")(
        output_dir=f"{folder}/{method}",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=10 * STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="sgd",
        use_cpu=True,
        layout="packed" if method in ("sft", "reward") else "shared",
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model(seed=0, reward=method == "reward", hidden=64, layers=2),
        args=args,
        train_dataset=Dataset.from_list(rows(8 * STEPS, seed=0, **options)),
        processing_class=tokenizer(),
    )
    steps = EachStep(Waits())
    trainer.add_callback(steps)
    with on_meta(trainer), steps.waits:
        trainer.train()
    return *steps.steps[1], len(trainer._window.batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    for method in parser.parse_args().methods.split(","):
        with TemporaryDirectory() as folder:
            read, sent, batches = count(method, folder)
        print(f"{method}: {read.total()} waits and {sent.total()} copies in a step of {batches} micro-batches")
        for what, places in (("waits", read), ("copies", sent)):
            for where, number in places.most_common():
                print(f"    {number} {what}: {where}")


if __name__ == "__main__":
    main()
