"""Against vLLM itself: run where TRL_TEST_VLLM names the program `vllm`, skipped elsewhere. On a CPU it takes some minutes.

TRL_TEST_VLLM=/envs/vllm/bin/vllm VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 pytest tests/vllm
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
from dataclasses import replace

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.conftest import make_tokenizer
from tests.trainers.online_support import make_trainer
from tests.vllm.images import check_after_images, image_prompts, reader
from tests.vllm.support import (
    OPTIONS,
    PARAMS,
    PROMPTS,
    largest_difference,
    llama,
)
from trl.cli.vllm_serve import VLLMServeArguments, command_of, environment_of
from trl.errors import EngineError
from trl.rollouts.server import ServerEngine

PROGRAM = os.environ.get("TRL_TEST_VLLM")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PROGRAM, reason="TRL_TEST_VLLM names no program vllm")]

START = 600.0


def start(folder, mode, max_lora_rank=8):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arguments = VLLMServeArguments(
        model=str(folder),
        vllm=PROGRAM,
        port=port,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        logprobs_mode=mode,
        max_lora_rank=max_lora_rank,
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program = subprocess.Popen(command_of(arguments), env={**kept, **environment_of(arguments), "HF_HUB_OFFLINE": "1"})
    return program, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module", params=["processed_logprobs", "raw_logprobs"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "model"
    llama(9).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    program, url = start(folder, request.param)
    try:
        yield url, request.param
    finally:
        program.terminate()
        program.wait(60)


@pytest.mark.filterwarnings("ignore:http.* returns:UserWarning")
def test_images(tmp_path):
    """The server starts with other weights. vLLM needs torchvision for models that read images."""
    models = [reader("llava", seed, tmp_path / f"model-{seed}") for seed in (1, 2, 3)]
    program, url = start(tmp_path / "model-3", "raw_logprobs", max_lora_rank=None)
    try:
        engine = ServerEngine(url, models[0].processor.tokenizer, sync_dir=tmp_path, start_timeout=START, timeout=120)
        for step, tiny in enumerate(models[:2]):
            engine.sync(tiny.model, step)
            assert check_after_images(tiny, engine) < 1e-3
        _, (prompt, *_) = image_prompts(tiny)
        with pytest.raises(EngineError, match="tokens there and .* in the trainer"):
            engine.generate([replace(prompt, ids=[*prompt.ids, 7])], PARAMS)
        engine.close()
    finally:
        program.terminate()
        program.wait(60)


@pytest.fixture
def engine(served, tmp_path):
    engine = ServerEngine(served[0], make_tokenizer(), sync_dir=tmp_path, start_timeout=START, timeout=120)
    yield engine
    engine.close()


def test_weights_arrive_through_folders(engine, served):
    """Twice: the cache of the long prompt belongs to earlier weights the second time."""
    for step in (1, 2):
        model = llama(step)
        engine.sync(model, step)
        groups = engine.generate(PROMPTS, PARAMS, 3)
        assert [len(group) for group in groups] == [3] * 5
        assert all(rollout.version == step for group in groups for rollout in group)
        assert largest_difference(model, groups) < 1e-4


def test_adapters_arrive_as_adapters(engine, served):
    base = llama(5)
    base.save_pretrained(folder := engine.sync_dir / "base")
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder), "is_checkpoint_format": True}}
    requests.post(f"{served[0]}/collective_rpc", json=body, timeout=120).raise_for_status()
    requests.post(f"{served[0]}/reset_prefix_cache", timeout=120).raise_for_status()
    for step in (1, 2):
        torch.manual_seed(step)
        policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        engine.sync(policy, step)
        assert engine._model_name == "trl-policy"
        assert largest_difference(policy, engine.generate(PROMPTS, PARAMS, 2)) < 1e-4


def test_stops_are_part_of_completions(engine):
    model = llama(3)
    engine.sync(model, 3)
    greedy = replace(PARAMS, temperature=0.0, ignore_eos=True)
    whole = engine.generate(PROMPTS, greedy, 1)[0][0].ids
    for params in (
        replace(greedy, stop_token_ids=(whole[4],)),
        replace(greedy, stop=(make_tokenizer().decode([whole[4]]),)),
    ):
        (rollout,) = engine.generate(PROMPTS, params, 1)[0]
        assert rollout.ids == whole[: whole.index(whole[4]) + 1]
        assert rollout.finish_reason == "stop"


def test_a_seed_gives_the_same_samples(engine):
    engine.sync(llama(3), 3)
    first, second = (engine.generate(PROMPTS, PARAMS, 3) for _ in range(2))
    assert first == second
    assert len({rollout.ids for rollout in first[0]}) == 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:http.* returns:UserWarning")
def test_the_table_of_modes(engine, options):
    """Where the engine says that numbers are the policy's, they are; elsewhere they are off."""
    model = llama(3)
    engine.sync(model, 3)
    params = replace(PARAMS, **options)
    off = largest_difference(model, engine.generate(PROMPTS, params, 4), params.temperature)
    assert off < 1e-4 if engine.exact_logprobs(params) else off > 1e-3


def test_grpo_trains_on_its_samples(served, tmp_path):
    """The sampler stays the policy, step after step, while the policy moves."""
    model = llama(4)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served[0], "max_steps": 4}
    trainer = make_trainer(model, tmp_path, learning_rate=1e-3, seed=3, **options)
    trainer.train()
    trainer.engine.close()
    logs = [log for log in trainer.state.log_history if "sampling/kl" in log]
    assert len(logs) == 4
    assert all(abs(log["sampling/kl"]) < 1e-4 for log in logs)
    assert all(log["engine/sync_logp_difference"] < 1e-4 for log in logs)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
