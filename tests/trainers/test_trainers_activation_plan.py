"""Layers are checkpointed as the memory that is free asks for: decided before the first step, said, and without another
number."""

import logging
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.conftest import WIDTHS
from trl import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    KTOConfig,
    KTOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    RewardConfig,
    RewardTrainer,
    RFTConfig,
    SFTConfig,
    SFTTrainer,
)
from trl.models.checkpointing import checkpoint_activations, checkpointable_layers, kept_for_backward
from trl.models.score import unwrap
from trl.trainers.activation_plan import (
    FRAGMENTATION,
    TILES,
    ActivationPlan,
    activation_bytes,
    heaviest_micro_batch,
    plan_activations,
    trained_bytes,
)
from trl.trainers.heaviest import row_positions, shortened
from trl.trainers.out_of_memory import remedies
from trl.trainers.sampling_memory import sampling_bytes
from trl.types import Completion, Example

ROWS = Dataset.from_dict({"text": [f"cat {i} sat on mat." * (1 + i % 3) for i in range(16)]})


def planned(trainer_class, free, model, tokenizer, folder, rows, *, config, more=None, **options):
    """A trainer that is to plan with `free` bytes, as it does on CUDA."""
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = config(output_dir=str(folder), **common, **options)
    args.plans_checkpointing = True
    made = type("Planned", (trainer_class,), {"_free_bytes": lambda self: free})
    return made(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **(more or {}))


def needed(make_model, tokenizer, tmp_path, **options) -> int:
    """Bytes of a step of the tests below in which all layers keep their activations."""
    model = make_model("llama", num_hidden_layers=4, **options)
    trainer = planned(SFTTrainer, 2**40, model, tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=1)
    trainer.train()
    return trainer.activation_plan.needed


class Counts:
    """How often the network of each layer runs."""

    def __init__(self, model) -> None:
        self.runs = [0] * len(model.model.layers)
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(partial(self.count, i))

    def count(self, layer, *_) -> None:
        self.runs[layer] += 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fewer_layers_run_twice_where_more_is_free_and_numbers_stay(make_model, tokenizer, tmp_path, caplog, dropout):
    caplog.set_level(logging.INFO, logger="trl")
    whole = needed(make_model, tokenizer, tmp_path, attention_dropout=dropout)
    plans, runs, losses = [], [], []
    for free in (whole, whole - 1, 0):
        model = make_model("llama", num_hidden_layers=4, attention_dropout=dropout)
        trainer = planned(SFTTrainer, free, model, tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=2)
        counts = Counts(model)
        trainer.train()
        plans.append(trainer.activation_plan.recomputed)
        runs.append(counts.runs)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.args.gradient_checkpointing == (plans[-1] > 0)
        assert str(trainer.activation_plan) in caplog.text
    assert plans == [0, 1, 4]
    # Three forward passes are measured, and two steps of one micro-batch train.
    assert runs == [[5, 5, 5, 5], [7, 5, 5, 5], [7, 7, 7, 7]]
    assert losses[0] == losses[1] == losses[2]


def kept(trainer) -> list[int]:
    """Bytes that the heaviest micro-batch keeps as a whole, in each layer and in all else."""
    model, batch = trainer.model.train(), trainer.collate(heaviest_micro_batch(trainer))
    there = [*model.parameters(), *model.buffers()]
    layers = checkpointable_layers(unwrap(model))
    return kept_for_backward(lambda: trainer.forward_pass(model, batch), there, layers)


@pytest.mark.parametrize(("attention", "window"), [("sdpa", None), ("eager", None), ("sdpa", 200)])
def test_what_a_pass_keeps_is_foretold_from_shorter_ones(make_model, tokenizer, tmp_path, attention, window):
    """Of eager attention the larger part are numbers for pairs of tokens, here of rows of 512; masks are for those of windows."""
    rows = Dataset.from_list([{"input_ids": [6] * 512}] * 4)
    model = make_model("gemma3" if window else "llama", max_position_embeddings=512, sliding_window=window)
    model.set_attn_implementation(attention)
    options = {"config": SFTConfig, "per_device_train_batch_size": 2, "max_length": None, "layout": "padded"}
    trainer = planned(SFTTrainer, 0, model, tokenizer, tmp_path, rows, **options)
    examples = heaviest_micro_batch(trainer)
    positions = trainer.collate(examples).positions
    assert positions == 1024
    assert activation_bytes(trainer, examples, positions) == pytest.approx(kept(trainer), rel=0.02)
    assert model.config.sliding_window == window


@pytest.mark.parametrize("frozen", [0, 3])
def test_a_plan_counts_what_its_layers_keep(make_model, tokenizer, tmp_path, frozen):
    """Frozen layers keep nothing until they are checkpointed, when embeddings require gradients."""

    def make():
        model = make_model("llama", num_hidden_layers=4)
        model.model.embed_tokens.requires_grad_(not frozen)
        model.model.layers[:frozen].requires_grad_(False)
        rows = Dataset.from_list([{"input_ids": [6] * 128}] * 4)
        options = {"config": SFTConfig, "per_device_train_batch_size": 2, "max_length": None}
        return planned(SFTTrainer, 0, model, tokenizer, tmp_path, rows, **options)

    trainer, measured = make(), make()
    needed = [sum(kept(measured))]
    checkpoint_activations(measured.model, {"use_reentrant": False})
    for count in range(1, 5):
        for i, layer in enumerate(checkpointable_layers(measured.model)):
            layer.gradient_checkpointing = i < count
        needed.append(sum(kept(measured)))
    saving = [k for k in range(5) if needed[k] == min(needed[: k + 1])]
    assert saving == ([0, 4] if frozen else [0, 1, 2, 3, 4])
    for k in saving:
        free = FRAGMENTATION * (trained_bytes(trainer) + TILES + needed[k] + 1000)
        assert plan_activations(trainer, math.ceil(free)).recomputed == k


def test_what_was_asked_for_is_not_planned(make_model, tokenizer, tmp_path):
    for options in ({"gradient_checkpointing": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        assert not args.plans_checkpointing
    stream = ROWS.to_iterable_dataset()
    trainer = planned(SFTTrainer, 0, make_model("llama"), tokenizer, tmp_path, stream, config=SFTConfig, max_steps=1)
    assert not trainer.plans_activations()
    model = make_model("llama")
    trainer = planned(SFTTrainer, 0, model, tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=1)
    assert trainer.plans_activations()
    checkpoint_activations(model)
    assert not trainer.plans_activations()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_what_is_asked_for_later_is_done(make_model, tokenizer, tmp_path, name):
    """Beside a configuration, or put into it."""
    common = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = SFTConfig(output_dir=str(tmp_path), **common)
    if not hasattr(args, name):
        pytest.skip(f"this release of transformers has no {name}")
    args.plans_checkpointing = True
    model, data = make_model("llama"), {"train_dataset": ROWS, "processing_class": tokenizer}
    beside = SFTTrainer(model, args, **data, **{name: True}).args
    setattr(args, name, True)
    within = SFTTrainer(model, args, **data)
    for found in (beside, within.args):
        assert found.gradient_checkpointing
        assert getattr(found, "activation_checkpointing", True)
        assert not found.plans_checkpointing
    within.train()
    assert within.activation_plan is None
    assert all(layer.gradient_checkpointing for layer in checkpointable_layers(model))


def test_a_second_trainer_of_a_model_makes_a_plan_of_its_own(make_model, tokenizer, tmp_path):
    model, found = make_model("llama"), []
    for free in (0, 2**40):
        trainer = planned(SFTTrainer, free, model, tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=1)
        trainer.train()
        found.append(trainer.activation_plan.recomputed)
        assert not any(layer.gradient_checkpointing for layer in checkpointable_layers(model))
    assert found == [2, 0]


def test_what_a_collator_of_ones_own_gives_is_not_planned(make_model, tokenizer, tmp_path):
    def collate(rows):
        ids = torch.full((len(rows), 64), 6)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    more = {"data_collator": collate}
    trainer = planned(SFTTrainer, 0, make_model("llama"), tokenizer, tmp_path, ROWS, config=SFTConfig, more=more)
    assert not trainer.plans_activations()


def test_where_nothing_can_be_measured_all_layers_are_checkpointed(
    make_model, tokenizer, tmp_path, monkeypatch, caplog
):
    def too_large(self, model, batch):
        raise torch.OutOfMemoryError("4 GiB more")

    monkeypatch.setattr(SFTTrainer, "forward_pass", too_large)
    trainer = planned(SFTTrainer, 2**40, make_model("llama"), tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=1)
    trainer.train()
    assert trainer.activation_plan.recomputed == 2
    assert trainer.args.gradient_checkpointing
    assert "4 GiB more" in caplog.text


PAIRS = Dataset.from_dict({"prompt": ["cat "] * 8, "chosen": ["sat on mat"] * 8, "rejected": ["sat"] * 8})
JUDGED = Dataset.from_dict({"prompt": ["cat "] * 8, "completion": ["sat on mat"] * 8, "label": [True, False] * 4})
SCORED = Dataset.from_dict({"prompt": ["cat "] * 8, "completion": ["sat on mat"] * 8, "reward": [1.0, 2.0] * 4})
PROMPTS = Dataset.from_dict({"prompt": ["cat "] * 8})
SAMPLES = {"max_completion_length": 6, "num_generations": 2, "per_device_train_batch_size": 4}


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("trainer_class", "config", "rows", "options", "more"),
    [
        (SFTTrainer, SFTConfig, ROWS, {"packing": True, "max_length": 64}, {}),
        (DPOTrainer, DPOConfig, PAIRS, {}, {}),
        (CPOTrainer, CPOConfig, PAIRS, {}, {}),
        (KTOTrainer, KTOConfig, JUDGED, {}, {}),
        (RewardTrainer, RewardConfig, PAIRS, {}, {}),
        (ILQLTrainer, ILQLConfig, SCORED, {}, {}),
        (GRPOTrainer, GRPOConfig, PROMPTS, SAMPLES, {"reward_funcs": lengths}),
        (OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, SAMPLES, {"reward_funcs": lengths}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_method_finds_its_plan(tokenizer, tmp_path, trainer_class, config, rows, options, more):
    torch.manual_seed(0)
    kind = LlamaForSequenceClassification if trainer_class is RewardTrainer else LlamaForCausalLM
    model = kind(LlamaConfig(**WIDTHS, num_labels=1))
    trainer = planned(
        trainer_class, 2**40, model, tokenizer, tmp_path, rows, config=config, more=more, max_steps=1, **options
    )
    trainer.train()
    plan = trainer.activation_plan
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert (plan.layers, plan.recomputed) == (len(checkpointable_layers(trainer.model)), 0)
    assert plan.needed > FRAGMENTATION * 3 * trained
    assert len(heaviest_micro_batch(trainer)) > 0


def test_a_plan_in_words():
    assert ActivationPlan.of(kept=100, saved=[20] * 4, free=1000).what == "kept by all 4 layers"
    # 1.2 · 100 = 120 of 100; a layer saves 24.
    assert ActivationPlan.of(kept=100, saved=[20] * 4, free=100).what.endswith("by 1 of 4 layers")
    assert ActivationPlan.of(kept=100, saved=[20] * 4, free=20).what.endswith("all 4 layers")
    # The lowest two layers would take 4 more each: the third saves enough.
    assert ActivationPlan.of(kept=100, saved=[-4, -4, 40, 40], free=100).recomputed == 3


def test_positions_of_rows():
    trees = {"prompt_ids": [[1, 2], [], [3]], "completion_ids": [[[1], [2, 3]], [[]], []]}
    assert row_positions(Dataset.from_dict(trees)).tolist() == [5, 0, 1]
    assert row_positions(Dataset.from_dict(trees).select([2, 0])).tolist() == [1, 5]
    many = {name: column * 100 for name, column in trees.items()}
    assert row_positions(Dataset.from_dict(many).select([200, 99])).tolist() == [1, 5]
    # A prompt before each completion; and all completions as long as the longest.
    for rows in (Dataset.from_dict(trees), Dataset.from_dict(trees).to_list()):
        assert row_positions(rows, "packed").tolist() == [7, 0, 1]
        assert row_positions(rows, "padded").tolist() == [8, 0, 1]
    packed = {"input_ids": [[1, 2, 3], [4]], "mask": [[True] * 3, [True]], "seq_lengths": [[1, 2], [1]]}
    assert row_positions(Dataset.from_dict(packed)).tolist() == [3, 1]
    assert row_positions([{"prompt_ids": [1], "completion_ids": [[2, 3]]}]).tolist() == [3]
    assert isinstance(row_positions(Dataset.from_dict({"prompt_ids": [[1]] * 3})), np.ndarray)


@pytest.mark.parametrize("layout", ["packed", "padded", "shared"])
def test_the_heaviest_rows_are_those_of_the_layout(make_model, tokenizer, tmp_path, layout):
    """A long prompt is read twice, but where its completions share it."""
    twice = {"prompt": "cat sat on mat " * 12, "chosen": "sat", "rejected": "mat"}
    once = {"prompt": "cat", "chosen": "sat on mat " * 10, "rejected": "mat on sat " * 10}
    rows, model = Dataset.from_list([twice, once] * 2), make_model("llama")
    options = {"layout": layout, "max_length": None, "per_device_train_batch_size": 1, "shuffle_dataset": False}
    trainer = planned(DPOTrainer, 0, model, tokenizer, tmp_path, rows, config=DPOConfig, **options)
    each = [trainer.collate(trainer.to_examples([row])).positions for row in trainer.train_dataset]
    assert trainer.collate(heaviest_micro_batch(trainer)).positions == max(each)


def test_the_heaviest_micro_batch_is_the_largest_of_its_step(make_model, tokenizer, tmp_path):
    rows = Dataset.from_list([{"input_ids": [6] * n} for n in (10, 40, 20, 30)])
    options = {"config": SFTConfig, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = planned(SFTTrainer, 0, make_model("llama"), tokenizer, tmp_path, rows, **options)
    assert [len(example.completions[0]) for example in heaviest_micro_batch(trainer)] == [40]


def test_a_shorter_example_keeps_its_shape():
    example = Example([1] * 8, (Completion([2] * 4, None, {"reward": 1.0, "values": [0.5] * 4}), Completion([3])))
    found = shortened(example, 1 / 4)
    assert (len(found.prompt), [len(c) for c in found.completions]) == (2, [1, 1])
    assert found.completions[0].signals == {"reward": 1.0, "values": [0.5]}


@pytest.mark.parametrize(
    ("optim", "device", "processes", "size"),
    [
        ("adamw_torch_fused", "cuda", 1, 16 * (4 + 8)),
        ("adamw_torch_fused", "cuda", 2, 16 * (4 + 4 + 8)),  # with DDP's buckets
        ("adamw_torch", "cuda", 1, 16 * (4 + 8 + 4)),  # with the roots of all second moments
        ("adamw_torch", "cpu", 1, 16 * (4 + 8)),
        ("adamw_8bit", "cuda", 1, 16 * (4 + 2)),
        ("sgd", "cuda", 1, 16 * 4),
    ],
)
def test_bytes_of_gradients_and_states_by_hand(optim, device, processes, size):
    """16 trained numbers of 4 bytes, and 8 frozen ones."""
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(2, 4, bias=False).requires_grad_(False)])
    args = SimpleNamespace(optim=optim, device=torch.device(device))
    assert (
        trained_bytes(SimpleNamespace(args=args, model=model, accelerator=SimpleNamespace(num_processes=processes)))
        == size
    )


@pytest.mark.parametrize(
    ("device", "weights", "bf16", "cache_width", "is_copied"),
    [
        ("cpu", torch.float32, True, 4, False),
        ("cuda", torch.float32, False, 4, False),
        ("cuda", torch.float32, True, 2, True),
        ("cuda", torch.bfloat16, True, 2, False),
    ],
)
def test_bytes_of_sampling_by_hand(make_model, device, weights, bf16, cache_width, is_copied):
    """6 completions of at most 5 + 7 tokens, in 2 layers of 2 heads of 8 numbers."""
    model = make_model("llama", num_hidden_layers=2, num_key_value_heads=2).to(weights)
    args = SimpleNamespace(
        max_completion_length=7, prompts_per_rollout_batch=3, num_generations=2, bf16=bf16, fp16=False,
        device=torch.device(device),
    )  # fmt: skip
    cache = cache_width * 2 * 2 * (2 * 8) * 6 * (5 + 7)
    drawn = 3 * 4 * 6 * WIDTHS["vocab_size"]
    copied = sum(2 * p.numel() for name, p in model.named_parameters() if "norm" not in name) if is_copied else 0
    assert sampling_bytes(args, model, [{"prompt_ids": [1] * n} for n in (3, 5, 4)]) == cache + copied + drawn


@pytest.mark.parametrize(
    ("config", "options", "count"),
    [
        (GRPOConfig, {"gradient_accumulation_steps": 3}, 24),
        (GRPOConfig, {"steps_per_generation": 5}, 40),
        (OnlineDPOConfig, {"num_generations": 2}, 16),
        (RFTConfig, {"num_prompts": 7}, 28),
    ],
)
def test_sampling_counts_all_completions_of_a_rollout_batch(make_model, tmp_path, config, options, count):
    common = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 7, "use_cpu": True}
    model = make_model("llama")
    found, one = (
        sampling_bytes(args, model, [{"prompt_ids": [1] * 5}])
        for args in (config(str(tmp_path), **{**common, **options}), SimpleNamespace(**ONE_COMPLETION))
    )
    assert found == count * one


def test_sampling_holds_no_more_tokens_than_the_engine(make_model):
    model, rows = make_model("llama"), [{"prompt_ids": [1] * 1000}]
    some, many = (
        sampling_bytes(
            SimpleNamespace(**ONE_COMPLETION | {"num_generations": n, "max_completion_length": 1000}), model, rows
        )
        for n in (65, 6500)
    )
    assert some == many


ONE_COMPLETION = {
    "prompts_per_rollout_batch": 1,
    "num_generations": 1,
    "max_completion_length": 7,
    "bf16": False,
    "fp16": False,
    "device": torch.device("cpu"),
}


def test_running_out_of_memory_says_what_to_change(make_model, tokenizer, tmp_path, monkeypatch):
    def too_large(self, model, batch):
        raise torch.OutOfMemoryError("4 GiB more")

    monkeypatch.setattr(SFTTrainer, "loss", too_large)
    for free in (2**40, 0):
        trainer = planned(
            SFTTrainer, free, make_model("llama"), tokenizer, tmp_path, ROWS, config=SFTConfig, max_steps=1
        )
        with pytest.raises(torch.OutOfMemoryError) as raised:
            trainer.train()
        (note,) = raised.value.__notes__
        assert f"max_tokens_per_micro_batch={trainer.largest_pass // 2}:" in note
        for name in ("optim='adamw_8bit'", "peft_config"):
            assert name in note
        assert ("gradient_checkpointing=True" in note) == (trainer.activation_plan.recomputed < 2)


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        ({}, {"generation_batch_size"}),
        ({"use_vllm": True, "vllm_mode": "server"}, set()),
        ({"use_vllm": True, "vllm_mode": "colocate"}, {"vllm_enable_sleep_mode", "vllm_gpu_memory_utilization"}),
    ],
)
def test_remedies_fit_what_samples(engine, named):
    options = {"use_vllm": False, "vllm_gpu_memory_utilization": 0.3, "vllm_enable_sleep_mode": False, **engine}
    args = SimpleNamespace(
        num_generations=4, cuda_graphs=False, optim="adamw_8bit", device=torch.device("cuda"), **options
    )
    note = remedies(args, positions=8, is_adapter=True, keeps_activations=False)
    options = ("generation_batch_size", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization")
    assert {name for name in options if name in note} == named
