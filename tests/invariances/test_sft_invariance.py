"""The gradient of a step depends on its rows, not on how they were split, padded or laid out."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl import SFTConfig, SFTTrainer

WORDS = "the quick brown fox jumps over a lazy dog and then runs far away from the sleepy old farm".split()  # noqa: SIM905


def texts() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(WORDS[: 2 + 2 * (i % 8)]) + f" {i}." for i in range(8)]})


def prompts() -> Dataset:
    rows = range(8)
    prompt = [" ".join(WORDS[: 3 + i]) for i in rows]
    return Dataset.from_dict({"prompt": prompt, "completion": [f" {WORDS[i]} {i}" * (1 + i % 3) for i in rows]})


def chats() -> Dataset:
    def chat(i: int) -> list[dict]:
        ask = {"role": "user", "content": " ".join(WORDS[:i])}
        return [ask, {"role": "assistant", "content": f"{WORDS[i]}."}] * (1 + i % 3)

    return Dataset.from_dict({"messages": [chat(i) for i in range(8)]})


ROWS = {"texts": (texts, {}), "prompts": (prompts, {}), "chats": (chats, {"assistant_only_loss": True})}


def gradient(model, rows, tmp_path, tokenizer=None, **options):
    """(loss, gradients) of one optimizer step on all eight rows: with plain SGD at rate 1, what the step took away."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    tokenizer = tokenizer or make_tokenizer()
    trainer = SFTTrainer(model=model, args=SFTConfig(**config), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    return loss, {name: before[name] - p.detach().cpu() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, value in expected[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-5, atol=1e-5 * scale + 1e-7, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("averaging", ["token", "sequence"])
def test_micro_batches_and_accumulation(make_model, tmp_path, rows, averaging):
    data, options = ROWS[rows]
    options = {**options, "average_loss_over": averaging}
    expected = gradient(make_model("llama"), data(), tmp_path, **options)
    for size, steps in ((4, 2), (1, 8)):
        splits = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        assert_same(gradient(make_model("llama"), data(), tmp_path, **options, **splits), expected)
    budget = {"max_tokens_per_micro_batch": 120}
    assert_same(gradient(make_model("llama"), data(), tmp_path, **options, **budget), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_layouts(make_model, tmp_path, rows):
    data, options = ROWS[rows]
    expected = gradient(make_model("llama"), data(), tmp_path, layout="padded", **options)
    for layout in ("packed", "shared"):
        assert_same(gradient(make_model("llama"), data(), tmp_path, layout=layout, **options), expected)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_documents_apart(make_model, tmp_path, strategy):
    expected = gradient(make_model("llama"), texts(), tmp_path)
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 500}
    assert_same(gradient(make_model("llama"), texts(), tmp_path, **packing), expected)


def test_padding_side(make_model, tmp_path):
    found = [
        gradient(make_model("gpt2"), prompts(), tmp_path, make_tokenizer(padding_side=side))
        for side in ("left", "right")
    ]
    assert_same(*found)


def test_pad_token_equal_to_eos_keeps_the_stop_token(make_model, tmp_path):
    same = make_tokenizer()
    same.pad_token = same.eos_token
    assert_same(
        gradient(make_model("llama"), texts(), tmp_path, same, layout="padded"),
        gradient(make_model("llama"), texts(), tmp_path, layout="padded"),
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_to_a_plain_forward_with_labels(make_model, tmp_path, name):
    rows, tokenizer = prompts(), make_tokenizer()
    found = gradient(make_model(name), rows, tmp_path)
    model = make_model(name).train()
    summed, trained = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        summed = summed + model(torch.tensor([prompt + completion]), labels=labels).loss * len(completion)
        trained += len(completion)
    loss = summed / trained
    loss.backward()
    assert_same(found, (loss.item(), {n: p.grad for n, p in model.named_parameters()}))
