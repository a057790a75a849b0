"""The device of `pretended_cuda.py` refuses what CUDA refuses, and trainers run on it, with the numbers of a CPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.pretended_cuda import GIB, DeviceError, pretended_cuda, recording
from tests.trainers.ppo_support import TRIPLETS
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.cli.estimate import MemoryEstimate, with_sampling
from trl.errors import ConfigError
from trl.models.memory import ACTIVATIONS, PARTS
from trl.models.varlen import VARLEN
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.vllm import VLLMEngine
from trl.trainers.activation_plan import ActivationPlan
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")


@pytest.fixture
def device():
    with pretended_cuda() as recorder:
        yield recorder


def test_tensors_know_where_they_are(device):
    x = torch.ones(2, 3, device="cuda")
    layer = torch.nn.Linear(3, 4).to("cuda")
    out = layer(x)
    out.sum().backward()
    on_device = [x, x[0], x + 1, torch.zeros_like(x), x.new_tensor([1.0]), out, layer.weight.grad, copy.deepcopy(x)]
    assert {tensor.device.type for tensor in on_device} == {"cuda"}
    assert {tensor.device.type for tensor in (x.cpu(), x.to("cpu"), torch.ones(3))} == {"cpu"}
    assert torch.equal(x.cpu(), torch.ones(2, 3))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x @ torch.ones(3, 1),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: torch.nn.functional.embedding(torch.tensor([0]), x),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda x: recording(lambda: x.sum().item())(),
        lambda x: recording(lambda: x[x > 0])(),
        lambda x: recording(lambda: x + torch.ones(3).to(x.device))(),
    ],
    ids=["product", "stack", "lookup", "generator", "read", "mask", "copy"],
)
def test_what_cuda_refuses_is_refused(device, act):
    with pytest.raises(DeviceError):
        act(torch.ones(2, 3, device="cuda"))


def test_what_cuda_allows_is_allowed(device):
    x = torch.ones(2, 3, device="cuda")
    results = (x * torch.tensor(2.0), x[torch.tensor([1])], torch.where(x > 0, x, 0.0))
    assert {result.device.type for result in results} == {"cuda"}
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_cards_that_emulate_bfloat16_do_not_compute_in_it(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    options = {"output_dir": str(tmp_path), "report_to": "none"}
    assert not SFTConfig(**options).bf16
    with pytest.raises(ConfigError, match="bf16=True, but pretended"):
        SFTConfig(bf16=True, **options)


CHATS = {
    "prompt": ["cat on", "dog on", "hat on", "pig on"] * 4,
    "completion": [" mat.", " hill by sea.", " hat.", " top."] * 4,
}
PAIRS = {
    "prompt": CHATS["prompt"],
    "chosen": CHATS["completion"],
    "rejected": [" no.", " not at all.", " on.", " cat."] * 4,
}
LABELS = {**CHATS, "label": [True, False, True, True] * 4}
RUNS = {
    "sft": (SFTTrainer, SFTConfig, CHATS, {}),
    "sft, checkpointed": (SFTTrainer, SFTConfig, CHATS, {"gradient_checkpointing": True}),
    "sft, fp16": (SFTTrainer, SFTConfig, CHATS, {"fp16": True}),
    "sft, offloaded": (SFTTrainer, SFTConfig, CHATS, {"activation_offloading": True}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"layout": "shared"}),
    "kto": (KTOTrainer, KTOConfig, LABELS, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainers_run_on_it_with_the_numbers_of_a_cpu(make_model, tokenizer, tmp_path, name):
    trainer_class, config, columns, options = RUNS[name]

    def run(folder, **options):
        args = config(
            output_dir=str(tmp_path / folder), max_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-3,
            save_steps=2, report_to="none", disable_tqdm=True, **options,
        )  # fmt: skip
        rows = Dataset.from_dict(columns)
        trainer = trainer_class(make_model("llama"), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return trainer

    on_cpu = run("cpu", use_cpu=True, bf16=True, layout=options.get("layout", "packed"))
    with pretended_cuda() as recorder:
        trainer = run("cuda", **options)
        assert trainer.model.device.type == "cuda"
        assert trainer.model.config._attn_implementation == VARLEN
        assert (recorder.replays > 0) == ("activation_offloading" not in options)
    assert losses(trainer) == pytest.approx(losses(on_cpu), rel=2e-2)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_online_trainers_sample_on_it_by_graphs(device, make_model, tokenizer, tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        logging_steps=1, report_to="none", disable_tqdm=True, beta=0.1, cuda_graphs=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": CHATS["prompt"]})
    trainer = GRPOTrainer(
        make_model("llama"),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert device.replays > 0


def test_steps_that_are_replayed_draw_the_samples_of_steps_that_run(make_model):
    """Also where rows have more keys than when the step was captured."""
    model, params = make_model("llama"), SamplingParams(max_new_tokens=40, ignore_eos=True, seed=0)
    prompts = [Prompt([7, 8, 9]), Prompt([11] * 20)]
    expected = LocalEngine(model, static=True).generate(prompts, params, 2)
    with pretended_cuda():
        found = LocalEngine(model.to("cuda")).generate(prompts, params, 2)
    assert [rollout.ids for rollouts in found for rollout in rollouts] == [
        rollout.ids for rollouts in expected for rollout in rollouts
    ]


def test_a_step_that_cannot_be_captured_runs_and_is_not_tried_again(device, make_model, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("trl.rollouts.loop.capture", fail)
    engine, params = LocalEngine(make_model("llama").to("cuda")), SamplingParams(max_new_tokens=9, seed=0)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph") as said:
        first, second = (engine.generate([Prompt([7, 8, 9])], params, 2) for _ in range(2))
    assert first == second
    assert len(said) == 1


def test_a_step_of_ppo_on_it(device, make_model, tokenizer):
    from trl.models.value_heads.auto_models import with_value_head

    queries, responses, rewards = TRIPLETS
    config = PPOConfig(batch_size=len(queries), mini_batch_size=1)
    trainer = PPOTrainer(config, with_value_head(make_model("llama")), tokenizer=tokenizer)
    statistics = trainer.step(queries, responses, rewards)
    assert statistics["objective/kl"] == pytest.approx(0, abs=1e-2)


def test_only_tensors_on_the_device_are_gathered(device, tokenizer, make_model, monkeypatch):
    """NCCL takes no others. The second process does the same as the first."""
    from trl.models.value_heads.auto_models import with_value_head

    def gather(self, x):
        assert x.is_cuda
        return torch.cat([x, x])

    queries, responses, rewards = TRIPLETS
    trainer = PPOTrainer(PPOConfig(batch_size=len(queries)), with_value_head(make_model("llama")), tokenizer=tokenizer)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "gather", gather)
    statistics = trainer.step(queries, responses, rewards)
    assert statistics["ppo/mean_scores"] == pytest.approx(sum(map(float, rewards)) / len(rewards))


@pytest.mark.parametrize("sleeps", [False, True])
def test_memory_of_vllm_in_process_is_planned_for(device, make_model, tokenizer, tmp_path, monkeypatch, sleeps):
    """vLLM starts after the plan of activations. Asleep, it leaves the device to training, but not to what graphs hold."""
    monkeypatch.setattr("trl.rollouts.vllm.require", lambda *_, **__: None)
    engine = VLLMEngine(tokenizer, gpu_memory_utilization=0.5, enable_sleep_mode=sleeps)
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, report_to="none")
    rows = Dataset.from_dict({"prompt": ["cat on", "dog on"] * 8})
    trainer = GRPOTrainer(
        make_model("llama"),
        lambda completions: [0.0] * len(completions),
        args,
        rows,
        processing_class=tokenizer,
        engine=engine,
    )
    assert trainer._free_bytes() == (70 if sleeps else 30) * GIB
    trainer.activation_plan = ActivationPlan(2, 0, 40 * GIB, 70 * GIB)
    assert trainer.captures_by_default() == (not sleeps)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"vllm_mode": "server"}, 60),
        ({"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25}, 60 + 0.25 * 80),
        ({"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, 60),  # asleep while there are activations
    ],
)
def test_an_estimate_counts_vllm_where_it_runs(device, make_model, tmp_path, options, size):
    args = GRPOConfig(str(tmp_path), use_vllm=True, report_to="none", **options)
    estimate = MemoryEstimate(dict.fromkeys(PARTS, 0) | {ACTIVATIONS: 60 * GIB}, "cuda")
    trainer = SimpleNamespace(args=args, model=make_model("llama"), train_dataset=[])
    assert with_sampling(estimate, trainer).total == size * GIB


def test_all_processes_plan_for_the_device_with_the_least_memory(device, make_model, tokenizer, tmp_path, monkeypatch):
    args = SFTConfig(str(tmp_path), report_to="none")
    rows = Dataset.from_dict({"text": ["cat on mat"] * 8})
    trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "gather", lambda self, x: torch.cat([x, x - 20 * GIB]))
    assert trainer._free_everywhere() == 50 * GIB


def test_float16_weights_are_not_trained_with_scaled_gradients(device, make_model, tokenizer, tmp_path):
    from trl.models.value_heads.auto_models import with_value_head

    queries, responses, rewards = TRIPLETS
    args = SFTConfig(str(tmp_path), report_to="none", fp16=True, max_steps=1)
    rows = Dataset.from_dict({"text": ["cat on mat"] * 8})
    model = make_model("llama").half()
    with pytest.raises(ConfigError, match=r"fp16=True.*embed_tokens"):
        SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    step = PPOTrainer(PPOConfig(batch_size=len(queries), fp16=True), with_value_head(model), tokenizer=tokenizer).step
    with pytest.raises(ConfigError, match=r"fp16=True.*embed_tokens"):
        step(queries, responses, rewards)
