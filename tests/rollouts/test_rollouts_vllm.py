"""vLLM in process, by a fake with vLLM's calls that samples with this library: what is asked of it, in which order, and
what is said.

vLLM itself is asked in `tests/vllm`. What a CPU does not have is tried here alone: memory that is given up between
rollout batches.
"""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import MODELS, make_tokenizer
from tests.trainers.online_support import make_trainer
from trl.data.layout import lay_out
from trl.errors import ConfigError, DataError, EngineError
from trl.models.score import score
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.vllm import VLLMEngine
from trl.types import Completion, Example

PROMPTS = [Prompt([7, 8, 9, 10]), Prompt([20, 21], max_new_tokens=3)]
PARAMS = SamplingParams(max_new_tokens=6, seed=3, ignore_eos=True)


class Options:
    """`vllm.SamplingParams`."""

    def __init__(self, **given) -> None:
        self.__dict__.update(given)


class FakeLLM:
    """`vllm.LLM`: samples only while it is awake, from the weights that it read last."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, model, dtype, **options) -> None:
        self.options, self.asked, self.awake = options, [("start", options["enable_sleep_mode"])], True
        self.forgets, self.reason, self.reads = True, "length", True
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=options["max_model_len"]))
        self.read(model)
        FakeLLM.made.append(self)

    def read(self, folder) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def generate(self, prompts, options, use_tqdm):
        assert self.awake
        self.asked.append(("generate", len(prompts)))
        return [self._output(*each) for each in zip(prompts, options, strict=True)]

    def _output(self, prompt, options):
        params = SamplingParams(
            max_new_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed, ignore_eos=True
        )
        engine = LocalEngine(self.model, progress=False)
        (rollouts,) = engine.generate([Prompt(prompt["prompt_token_ids"])], params, options.n)
        outputs = [
            SimpleNamespace(
                index=i,
                token_ids=list(r.ids),
                logprobs=[{t: SimpleNamespace(logprob=value)} for t, value in zip(r.ids, r.logprobs, strict=True)],
                finish_reason=self.reason,
            )
            for i, r in reversed(list(enumerate(rollouts)))
        ]
        return SimpleNamespace(outputs=outputs, prompt_token_ids=prompt["prompt_token_ids"])

    def collective_rpc(self, method, kwargs):
        assert self.awake
        assert kwargs["is_checkpoint_format"]
        self.asked.append((method, None))
        if self.reads:
            self.read(kwargs["weights_path"])

    def reset_prefix_cache(self):
        self.asked.append(("forget", None))
        return self.forgets

    def sleep(self, level):
        self.asked.append(("sleep", level))
        self.awake = False

    def wake_up(self):
        self.asked.append(("wake up", None))
        self.awake = True


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = FakeLLM, Options
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MODELS["llama"](max_position_embeddings=256).eval()


def engine_of(tmp_path, **options) -> VLLMEngine:
    return VLLMEngine(make_tokenizer(), sync_dir=tmp_path, **{"max_model_len": 200, **options})


def off(model, groups) -> float:
    """The largest difference from the model's own log-probabilities."""
    examples = [
        Example(prompt.ids, tuple(Completion(r.ids) for r in group))
        for prompt, group in zip(PROMPTS, groups, strict=True)
    ]
    with torch.no_grad():
        rows = score(model, lay_out(examples, "padded")).logprobs
    rollouts = [rollout for group in groups for rollout in group]
    return max(
        (row[: len(r)] - torch.tensor(r.logprobs)).abs().max().item() for row, r in zip(rows, rollouts, strict=True)
    )


@pytest.mark.parametrize("sleeps", [False, True])
def test_weights_of_every_step_and_sleep_between(model, sleeps, tmp_path):
    """It is awake to read and to sample, and asleep whenever the policy learns; each version is checked with one prompt."""
    engine = engine_of(tmp_path, enable_sleep_mode=sleeps)
    later = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(1.5)
    for step, policy in enumerate((model, later)):
        engine.sync(policy, step)
        engine.sync(policy, step)
        groups = engine.generate(PROMPTS, PARAMS, 2)
        assert [[len(rollout) for rollout in group] for group in groups] == [[6, 6], [3, 3]]
        assert {rollout.version for group in groups for rollout in group} == {step}
        assert off(policy, groups) < 1e-4
    (llm,) = FakeLLM.made
    rest, up = ([("sleep", 1)], [("wake up", None)]) if sleeps else ([], [])
    first = [("start", sleeps), ("generate", 1), ("generate", 2), *rest]
    second = [*up, ("reload_weights", None), ("forget", None), ("generate", 1), ("generate", 2), *rest]
    assert llm.asked == first + second
    assert engine.generate(PROMPTS, PARAMS, 2) == groups  # a seed gives the same samples, and it was woken
    assert engine.take_metrics()["engine/sync_logp_difference"] < 1e-5
    (folder,) = tmp_path.iterdir()
    assert [each.name for each in folder.iterdir()] == ["1"]
    engine.close()
    assert not folder.exists()


def test_options_are_those_of_vllm(model, tmp_path):
    engine = engine_of(tmp_path, gpu_memory_utilization=0.4, model_impl="transformers", temperature=0.7)
    engine.sync(model, 0)
    options = FakeLLM.made[0].options
    assert (options["gpu_memory_utilization"], options["model_impl"]) == (0.4, "transformers")
    assert (options["logprobs_mode"], options["generation_config"]) == ("processed_logprobs", "vllm")
    assert engine_of(tmp_path).mode == "raw_logprobs"
    with pytest.warns(UserWarning, match="vLLM returns processed_logprobs"):
        assert not engine.exact_logprobs(SamplingParams(temperature=0.7, top_k=3))
    with pytest.raises(ConfigError, match="vllm_tensor_parallel_size=2 does not divide the number of processes, 1"):
        engine_of(tmp_path, tensor_parallel_size=2)
    engine.close()


def test_what_goes_wrong(model, tmp_path):
    engine = engine_of(tmp_path)
    with pytest.raises(EngineError, match="call sync"):
        engine.generate(PROMPTS, PARAMS, 1)
    engine.sync(model, 0)
    (llm,) = FakeLLM.made
    with pytest.raises(DataError, match=r"prompts\[1\] has 200 tokens, but vLLM's context is 200"):
        engine.generate([PROMPTS[0], Prompt([5] * 200)], PARAMS, 1)
    with pytest.raises(DataError, match=r"prompts\[0\] has model inputs"):
        engine.generate([Prompt([5], {"pixel_values": 1})], PARAMS, 1)
    with pytest.raises(DataError, match=r"prompts\[0\] has max_new_tokens=0: give at least 1, or None"):
        engine.generate([Prompt([5], max_new_tokens=0)], PARAMS, 1)
    llm.reason = "error"
    with pytest.raises(EngineError, match="finish reason 'error'"):
        engine.generate(PROMPTS, PARAMS, 1)
    llm.reason, llm.forgets = "length", False
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        engine.sync(model, 1)
    llm.forgets, llm.reads = True, False
    with torch.no_grad():
        model.lm_head.weight.mul_(-3)
    with pytest.raises(EngineError, match="vLLM does not sample from the weights of the trainer"):
        engine.sync(model, 2)
    engine.close()


def test_grpo_trains_on_its_samples(model, tmp_path):
    options = {"use_vllm": True, "vllm_enable_sleep_mode": True, "vllm_max_model_length": 200, "max_steps": 2}
    trainer = make_trainer(model, tmp_path, rollout_sync_dir=str(tmp_path / "weights"), learning_rate=1e-2, **options)
    trainer.train()
    trainer.engine.close()
    logs = [log for log in trainer.state.log_history if "sampling/kl" in log]
    assert len(logs) == 2
    assert all(abs(log["sampling/kl"]) < 1e-4 for log in logs)
    assert [name for name, _ in FakeLLM.made[0].asked].count("reload_weights") == 1
