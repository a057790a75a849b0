"""Options for GPUs that need none to be checked."""

import copy
import os
from contextlib import contextmanager
from math import ceil, floor

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification, modeling_utils

from tests.conftest import WIDTHS
from tests.models.test_models_graphs import Recorder
from tests.trainers.ppo_support import TRIPLETS
from tests.vision.support import gemma3, llava, qwen2_5_vl
from tests.vision.test_vision_training import LORA, history, trainer_of
from tests.vision.test_vision_training import rows as image_rows
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.errors import ConfigError
from trl.imports import is_available
from trl.models.compiled import repeated_layers
from trl.models.graphs import Graphs, graphs_of
from trl.trainers.activation_plan import FRAGMENTATION
from trl.trainers.base import BaseTrainer
from trl.trainers.config import liger_layers
from trl.trainers.ilql import ILQLConfig, ILQLTrainer
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer
from trl.trainers.sampling_memory import sampling_bytes


def common_options(**more):
    return {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "report_to": "none", **more}


def test_apples_gpu_is_left_for_the_cpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = SFTConfig(output_dir=str(tmp_path), **common_options())
    assert args.use_cpu
    assert args.device.type == "cpu"
    assert "mps" in caplog.text


def test_ligers_layers_are_used_and_the_head_is_left_as_it_is():
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger_layers(None) == losses
    assert liger_layers({"rope": False}) == {"rope": False} | losses
    assert liger_layers('{"swiglu": false}') == {"swiglu": False} | losses


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_ligers_losses_are_refused(name):
    with pytest.raises(ConfigError, match=f"liger_kernel_config={{'{name}': True}}"):
        liger_layers({name: True})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiling_layers_changes_no_loss(make_model, tokenizer, tmp_path, monkeypatch):
    """`torch_compile` compiles layers, and accelerate is not to compile the model around them."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", os.environ.get(f"ACCELERATE_DYNAMO_{name}", "no"))
    rows, losses = Dataset.from_dict({"text": [f"cat {i} sat on mat." * (1 + i % 3) for i in range(16)]}), []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        common = common_options(
            max_steps=2, bf16=False
        )  # under autocast layers are called in a way of the library's own
        args = SFTConfig(output_dir=str(tmp_path), **common, **options)
        trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
        compiled = [layer._compiled_call_impl is not None for layer in repeated_layers(trainer.model)]
        assert compiled == [bool(options)] * 2
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.model_wrapped) is trainer.model
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_layers_of_reward_models_are_compiled_too(tokenizer, tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", os.environ.get(f"ACCELERATE_DYNAMO_{name}", "no"))
    options = {"torch_compile": True, "torch_compile_backend": "eager", "bf16": False, "report_to": "none"}
    args = RewardConfig(output_dir=str(tmp_path), disable_tqdm=True, **options)
    rows = Dataset.from_dict({"chosen": ["cat sat"] * 4, "rejected": ["mat sat"] * 4})
    model = LlamaForSequenceClassification(LlamaConfig(**WIDTHS, num_labels=1))
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert all(layer._compiled_call_impl is not None for layer in repeated_layers(trainer.model))


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_a_run_whose_layers_keep_less_is_the_same_to_the_bit(make_model, tokenizer, tmp_path, monkeypatch, options):
    """What a device does by itself, without its kernels."""
    rows, found = Dataset.from_dict({"text": [f"cat {i} sat on mat." * (1 + i % 3) for i in range(16)]}), []
    monkeypatch.setattr("trl.trainers.layers.fuse", lambda model: None)
    for fuses in (False, True):
        monkeypatch.setattr(SFTTrainer, "_fuses", lambda self, fuses=fuses: fuses)
        args = SFTConfig(output_dir=str(tmp_path), **common_options(max_steps=2, use_cpu=True) | options)
        trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
        assert ("forward" in vars(trainer.model.model.layers[0].mlp)) == fuses
        trainer.train()
        found.append(trainer.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_run_of_an_adapter_in_few_kernels_learns_the_same(make_model, tokenizer, tmp_path, monkeypatch):
    rows, found = Dataset.from_dict({"text": [f"cat {i} sat on mat." * (1 + i % 3) for i in range(16)]}), []
    monkeypatch.setattr("trl.trainers.layers.fuse", lambda model: None)
    for fuses in (False, True):
        monkeypatch.setattr(SFTTrainer, "_fuses", lambda self, fuses=fuses: fuses)
        options = common_options(max_steps=3, use_cpu=True, learning_rate=1e-2, bf16=False, logging_steps=1)
        adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
        args = SFTConfig(output_dir=str(tmp_path), **options)
        trainer = SFTTrainer(
            make_model("llama"), args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )
        layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
        assert ("forward" in vars(layer)) == fuses
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][-1] < found[0][0]


def test_offloading_keeps_the_start_of_every_layer_elsewhere_and_no_other_number(
    make_model, tokenizer, tmp_path, monkeypatch
):
    losses, kept = [], []

    @contextmanager
    def elsewhere(**options):
        def pack(tensor):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    monkeypatch.setattr(modeling_utils, "save_on_cpu", elsewhere)
    rows = Dataset.from_dict({"text": ["cat sat on mat."] * 8})
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}):
        common = {"max_steps": 2, "bf16": False, "logging_steps": 1, "report_to": "none"}
        args = SFTConfig(output_dir=str(tmp_path / str(len(losses))), **common, **options)
        trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert sum(shape[-1] == WIDTHS["hidden_size"] for shape in kept) >= 2 * 2  # layers × steps


def test_offloading_is_asked_of_transformers(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": False})
    args.gradient_checkpointing = None
    args.offload_activations(accelerated=True)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, "offload": True}


@pytest.mark.parametrize(
    ("accelerated", "checkpoints", "has_it", "words"),
    [
        (False, None, True, "are in host memory already"),
        (True, False, True, "gradient_checkpointing=False checkpoints none"),
        (True, None, False, "needs transformers 5.17 or later, and this is"),
    ],
)
def test_offloading_that_cannot_be_is_refused(tmp_path, monkeypatch, accelerated, checkpoints, has_it, words):
    monkeypatch.setattr("trl.trainers.config.offloads_activations", lambda: has_it)
    args = SFTConfig(output_dir=str(tmp_path))
    args.gradient_checkpointing = checkpoints
    with pytest.raises(ConfigError, match=words):
        args.offload_activations(accelerated=accelerated)


ROWS = {
    "sft": {"text": [f"cat {i} sat on mat." * (1 + i % 3) for i in range(24)]},
    "dpo": {"prompt": ["cat"] * 24, "chosen": [f" sat {i}" for i in range(24)], "rejected": [" on mat"] * 24},
}


TRAINERS = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Trainers run on the CPU as they do on CUDA in bfloat16, without its kernels."""
    for place in ("trl.models.layouts", "trl.models.varlen", "trl.trainers.ppo.model"):
        monkeypatch.setattr(f"{place}.has_varlen", lambda model: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(BaseTrainer, "_is_on_cuda", lambda self: True)
    monkeypatch.setattr(BaseTrainer, "_fuses", lambda self: False)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_whose_layers_are_replayed_is_the_same(make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda, kind):
    """With what stands in for CUDA's graphs; two micro-batches a step, and evaluations in between."""
    recorder, found = Recorder(), []
    config, trainer = TRAINERS[kind]
    rows = Dataset.from_dict(ROWS[kind])
    monkeypatch.setattr("trl.models.graphs.cuda_graph", recorder)
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(Graphs, "_capture", lambda *_: None)
        options = common_options(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=3)
        options |= {"use_cpu": True, "bf16": True, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2}
        options["html_report"] = False
        args = config(output_dir=str(tmp_path), **options)
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(6)), "processing_class": tokenizer}
        run = trainer(make_model("llama"), args=args, **data)
        run.train()
        for model in (run.model, *run._also_reading()):
            assert not graphs_of(model).count  # whose memory is for others now
        found.append([[e.get(k, 0) for k in ("loss", "eval_loss", "grad_norm")] for e in run.state.log_history])
    assert recorder.recorded >= {"sft": 3, "dpo": 4}[kind]  # forward and backward; evaluation; reference
    assert recorder.replays >= 10
    for ours, plain in zip(*found, strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_cpu": True}, "CUDA"),
        ({"layout": "padded"}, "masks"),
        ({"neftune_noise_alpha": 5.0, "layout": "packed"}, "neftune_noise_alpha"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
)
def test_graphs_that_cannot_be_are_refused_by_reason(
    make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda, options, word
):
    if word == "CUDA":
        monkeypatch.setattr(BaseTrainer, "_is_on_cuda", lambda self: False)
    options = common_options(bf16=True) | {"use_cpu": True} | options
    args = SFTConfig(output_dir=str(tmp_path), cuda_graphs=True, **options)
    with pytest.raises(ConfigError, match=f"cuda_graphs=True.*{word}"):
        SFTTrainer(make_model("llama"), args, train_dataset=Dataset.from_dict(ROWS["sft"]), processing_class=tokenizer)


def test_a_trainer_without_graphs_takes_those_of_one_before_it_away(make_model, tokenizer, tmp_path, as_on_cuda):
    model, data = make_model("llama"), {"train_dataset": Dataset.from_dict(ROWS["sft"]), "processing_class": tokenizer}
    for asked in (None, False):
        options = common_options(bf16=True, use_cpu=True, cuda_graphs=asked)
        SFTTrainer(model, SFTConfig(output_dir=str(tmp_path), **options), **data)
        assert (graphs_of(model) is not None) == (asked is None)


def test_layers_of_a_trainer_that_samples_are_replayed_where_both_have_room(
    make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda
):
    """What graphs hold, they hold while a rollout batch is sampled; the reference is replayed where the policy is."""
    rows = Dataset.from_dict({"prompt": ["cat sat", "on a mat", "cat", "mat"] * 3})
    options = {"use_cpu": True, "bf16": True, "num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    options |= common_options(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, html_report=False)
    recorder, found = Recorder(), []
    monkeypatch.setattr("trl.models.graphs.cuda_graph", recorder)

    def run(free):
        monkeypatch.setattr(GRPOTrainer, "_free_bytes", lambda self: free)
        args = GRPOConfig(output_dir=str(tmp_path), **options)
        args.plans_checkpointing = True
        trainer = GRPOTrainer(make_model("llama"), by_length, args, rows, processing_class=tokenizer)
        before = recorder.replays
        trainer.train()
        found.append([[e.get(k, 0) for k in ("loss", "grad_norm", "kl")] for e in trainer.state.log_history])
        return trainer, recorder.replays - before

    trainer, replays = run(2**40)
    assert replays >= 3 * 2  # policy forward and backward, after the steps in which it is tried and captured
    assert graphs_of(trainer.reference.model) is not None
    needed = trainer.activation_plan.needed
    both = needed + FRAGMENTATION * sampling_bytes(trainer.args, trainer.model, trainer.train_dataset)
    assert run(ceil(both))[1] == replays
    for free in (floor(both) - 1, needed):
        trainer, replays = run(free)
        assert trainer.activation_plan.recomputed == replays == 0
    monkeypatch.setattr(Graphs, "_capture", lambda *_: None)  # batches of the same sizes, and no replay
    assert run(2**40)[1] == 0
    for ours, plain in zip(found[0], found[-1], strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.fixture
def as_on_cuda_in_graphs(as_on_cuda, monkeypatch):
    """As on CUDA, with what stands in for its graphs: returns the recorder."""
    recorder = Recorder()
    monkeypatch.setattr("trl.models.graphs.cuda_graph", recorder)
    return recorder


PPO = {"num_generations": 2, "max_completion_length": 6, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2}
VALUES = {
    "adapter": (PPOConfig, PPOTrainer, {"peft_config": LoraConfig(r=4, lora_dropout=0.0)}),
    "network": (PPOConfig, PPOTrainer, {"value_model": "llama"}),
    "ilql": (ILQLConfig, ILQLTrainer, {}),
}


def trainer_with_values(make_model, tokenizer, folder, kind, **options):
    config, trainer, keywords = VALUES[kind]
    common = common_options(use_cpu=True, bf16=True, cuda_graphs=True, learning_rate=1e-2, html_report=False)
    common |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    common |= {"lr_scheduler_type": "constant"}
    if kind == "ilql":
        rows = Dataset.from_dict({"prompt": ["say "] * 8, "completion": ["red", "blue"] * 4, "reward": [1.0, 2.0] * 4})
        common |= {"per_device_train_batch_size": 4}
    else:
        rows, own = Dataset.from_dict({"prompt": ["cat sat", "on a mat", "cat", "mat"] * 3}), dict(keywords)
        keywords = own | {"reward_funcs": by_length}
        common |= PPO
    if "value_model" in keywords:
        keywords["value_model"] = make_model(keywords["value_model"], seed=5, num_hidden_layers=1)
    args = config(output_dir=str(folder), **common | options)
    data = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "processing_class": tokenizer}
    return trainer(model=make_model("llama"), args=args, **data, **keywords)


@pytest.mark.parametrize("kind", VALUES)
def test_a_run_with_values_whose_layers_are_replayed_is_the_same(
    make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda_in_graphs, kind
):
    """Sampling and evaluations in between; the second run is resumed in the middle, and replays again."""
    logs, recorder = [], as_on_cuda_in_graphs
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(Graphs, "_capture", lambda *_: None)
        folder = tmp_path / str(captures)
        for steps in (3, 6) if captures else (6,):
            before = recorder.replays
            trainer = trainer_with_values(make_model, tokenizer, folder, kind, max_steps=steps)
            trainer.train(resume_from_checkpoint=steps == 6 and captures)
            assert (recorder.replays >= before + 4) == captures
        log = trainer.state.log_history
        logs.append(
            [[e.get(k, 0) for k in ("loss", "eval_loss", "grad_norm")] for e in log if "train_runtime" not in e]
        )
    assert len(logs[0]) == len(logs[1]) == 6 + 2
    for ours, plain in zip(*logs, strict=True):
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("value_model", [None, "llama"])
def test_triplets_are_learned_from_by_replays(
    make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda_in_graphs, value_model
):
    found, recorder = [], as_on_cuda_in_graphs
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(Graphs, "_capture", lambda *_: None)
        options = {"use_cpu": True, "bf16": True, "cuda_graphs": True, "report_to": "none", "learning_rate": 1e-2}
        config = PPOConfig(output_dir=str(tmp_path), batch_size=4, mini_batch_size=2, ppo_epochs=2, **options)
        network = value_model and make_model(value_model, seed=5, num_hidden_layers=1)
        torch.manual_seed(0)
        trainer = PPOTrainer(config, make_model("llama"), None, tokenizer, value_model=network)
        stats = [trainer.step(*TRIPLETS) for _ in range(3)]
        names = ("ppo/loss/total", "ppo/loss/value", "ppo/policy/entropy", "ppo/val/mean")
        found.append([each[name] for each in stats for name in names])
    assert recorder.replays > 12
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_values_of_own_layers_are_refused(make_model, tokenizer, as_on_cuda_in_graphs):
    config = PPOConfig(batch_size=4, use_cpu=True, bf16=True, cuda_graphs=True, num_value_layers=1)
    with pytest.raises(ConfigError, match="cuda_graphs=True.*num_value_layers"):
        PPOTrainer(config, make_model("llama"), None, tokenizer)


IMAGES = {
    "dpo": (qwen2_5_vl, "pairs", {"peft_config": LoraConfig(**LORA)}),  # with features that are kept
    "sft": (llava, "completion", {}),
    "grpo": (qwen2_5_vl, "prompts", {"num_generations": 2, "beta": 0.1, "gradient_checkpointing": False}),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_run_on_images_whose_layers_are_replayed_is_the_same(tmp_path, monkeypatch, as_on_cuda_in_graphs, kind):
    make, data, options = IMAGES[kind]
    recorder, found = as_on_cuda_in_graphs, []
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(Graphs, "_capture", lambda *_: None)
        options = options | {"bf16": True, "cuda_graphs": True, "max_steps": 4, "html_report": False}
        found.append(history(trainer_of(kind, tmp_path, make(), image_rows(data), **options)))
    assert recorder.replays >= 4
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_images_that_see_ahead_are_refused(tmp_path, as_on_cuda):
    with pytest.raises(ConfigError, match="cuda_graphs=True.*attention with masks"):
        trainer_of("sft", tmp_path, gemma3(), image_rows("completion"), bf16=True, cuda_graphs=True)


@pytest.mark.skipif(not is_available("bitsandbytes"), reason="bitsandbytes is not installed")
def test_a_run_on_four_bits_is_replayed_and_one_on_eight_is_refused(
    make_model, tokenizer, tmp_path, monkeypatch, as_on_cuda_in_graphs
):
    blocks = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    make_model("llama", **blocks).save_pretrained(tmp_path / "base")
    recorder, losses = as_on_cuda_in_graphs, []
    options = common_options(max_steps=4, use_cpu=True, bf16=True, cuda_graphs=True, learning_rate=1e-2)
    args = SFTConfig(output_dir=str(tmp_path / "run"), html_report=False, **options)

    def trainer_on(**bits):
        data = {"train_dataset": Dataset.from_dict(ROWS["sft"]), "processing_class": tokenizer}
        data |= {"quantization_config": BitsAndBytesConfig(**bits), "peft_config": LoraConfig(r=2)}
        return SFTTrainer(str(tmp_path / "base"), copy.deepcopy(args), **data)

    with pytest.raises(ConfigError, match="cuda_graphs=True.*quantised weights"):
        trainer_on(load_in_8bit=True)
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(Graphs, "_capture", lambda *_: None)
        trainer = trainer_on(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert recorder.replays >= 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def by_length(completions, **_):
    return [-len(completion) / 10 for completion in completions]
