"""Weights over NCCL: where buffers are cut, what servers are asked in which order, and what arrives, without NCCL."""

from __future__ import annotations

import base64
import copy
import json
import threading
from math import prod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.conftest import MODELS
from tests.serve.support import serve, serving
from trl.errors import EngineError, ModelError
from trl.rollouts.connection import Server
from trl.rollouts.nccl import NCCLCommunicator
from trl.rollouts.nccl_transfer import NCCLTransfer
from trl.rollouts.packing import WeightMeta, buffer_sizes, packed, weights_meta
from trl.rollouts.server import ServerEngine

CPU = torch.device("cpu")
BUFFER = 5000
"""Bytes: several buffers, some of one weight alone."""


class Wire:
    """A `Communicator` whose other ranks are a server in this process: what is broadcast is there at once."""

    def __init__(self):
        self.unique_id, self.device = base64.b64encode(bytes(128)).decode(), CPU
        self.world_size, self.buffers, self.aborted = None, [], False

    def connect(self, world_size):
        self.world_size = world_size

    def broadcast(self, tensor):
        assert tensor.dtype == torch.uint8
        self.buffers.append(tensor.clone())

    def is_done(self):
        return True

    def abort(self):
        self.aborted = True


class Stuck(Wire):
    """Whose bytes never arrive."""

    def is_done(self):
        return not self.buffers


class Workers:
    """vLLM's routes for weights, of two workers; `failing` is a path that answers 500."""

    def __init__(self, failing=None):
        self.asked, self.bodies, self.failing = [], {}, failing

    def app(self):
        async def answer(request):
            path, body = request.url.path, await request.body()
            self.asked.append(path)
            self.bodies[path] = json.loads(body) if body else None
            if path == self.failing:
                return Response("a worker is gone", 500)
            return JSONResponse({"success": True, "world_size": 2})

        return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


def received(buffers, info):
    """Weights by name, read from bytes as vLLM's workers do: cut where names, types and shapes say."""
    parts = iter(buffers)
    found, part = {}, torch.empty(0, dtype=torch.uint8)
    for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
        if not part.numel():
            part = next(parts)
        kind = getattr(torch, dtype)
        size = prod(shape) * kind.itemsize
        found[name], part = part[:size].view(kind).view(shape), part[size:]
    assert not part.numel()
    assert next(parts, None) is None
    return found


def test_a_buffer_ends_with_the_weight_that_takes_it_beyond_the_limit():
    assert buffer_sizes([4, 4, 4, 20, 1], 10) == [12, 20, 1]
    assert buffer_sizes([5, 5, 5], 10) == [15]
    assert buffer_sizes([5, 5], 10) == [10]
    assert buffer_sizes([], 10) == []


def test_bytes_of_all_types():
    weights = [
        ("a", torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)),
        ("b", torch.tensor(7)),
        ("c", torch.arange(6.0).view(2, 3).t()),  # not contiguous
    ]
    metas = [WeightMeta.of(name, tensor) for name, tensor in weights]
    buffers = list(packed(iter(weights), metas, 3, CPU))
    assert [len(buffer) for buffer in buffers] == [4, 8, 24]
    assert buffers[0].tolist() == [0x80, 0x3F, 0x00, 0xC0]
    assert buffers[2].view(torch.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    with pytest.raises(ModelError, match=r"The weight a is now torch.bfloat16 \(1, 2\), but WeightMeta\(name='b'"):
        list(packed(iter(weights), metas[1:] + metas[:1], 3, CPU))


@pytest.mark.parametrize("adapter", [False, True])
def test_what_workers_are_asked_and_what_arrives(model, adapter):
    expected = policy = model
    if adapter:
        policy = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        expected = copy.deepcopy(policy).merge_and_unload()
    wires, workers = [], Workers()
    with serving(workers.app()) as served:
        server = Server(served.url, timeout=30)
        transfer = NCCLTransfer(30, lambda: wires.append(Wire()) or wires[-1], BUFFER)
        transfer.send([server], policy, 7)
        once = ["/get_world_size", "/init_weight_transfer_engine"]
        update = ["/pause", "/start_weight_update", "/update_weights"]
        end = ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
        assert workers.asked == once + update + end
        transfer.send([server], policy, 8)
        assert workers.asked == once + (update + end) * 2
    (wire,) = wires
    assert wire.world_size == 3
    init = workers.bodies["/init_weight_transfer_engine"]["init_info"]
    assert init == {
        "nccl_unique_id_b64": wire.unique_id,
        "rank_offset": 1,
        "world_size": 3,
        "packed": True,
        "packed_buffer_size_bytes": BUFFER,
        "packed_num_buffers": 2,
    }
    assert workers.bodies["/finish_weight_update"] == {"weight_version": "8"}
    assert server.version == "8"
    buffers = wire.buffers[: len(wire.buffers) // 2]
    assert len(buffers) > 5
    found = received(buffers, workers.bodies["/update_weights"]["update_info"])
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value)
    transfer.close()
    assert wire.aborted


@pytest.mark.parametrize("failing", ["/update_weights", "/start_weight_update", "/init_weight_transfer_engine"])
def test_a_server_that_fails_leaves_the_others_alone(model, failing):
    """And takes the next weights from the beginning."""
    good, bad, wires = Workers(), Workers(failing), []
    with serving(good.app()) as one, serving(bad.app()) as two:
        servers = [Server(each.url, timeout=30) for each in (one, two)]
        transfer = NCCLTransfer(30, lambda: wires.append(Wire()) or wires[-1], BUFFER)
        transfer.send(servers, model, 1)
        assert [server.version for server in servers] == ["1", None]
        assert [wire.aborted for wire in wires] == [False, True]
        assert "/resume" not in bad.asked  # it holds parts of two versions
        bad.failing = None
        bad.asked.clear()
        transfer.send(servers, model, 2)
        assert [server.version for server in servers] == ["2", "2"]
        assert bad.asked[:3] == ["/shutdown_weight_transfer_engine", "/get_world_size", "/init_weight_transfer_engine"]
        transfer.close()
        good.failing = bad.failing = "/update_weights"
        with pytest.raises(EngineError, match=r"(?s)No server has loaded the weights of step 3.*a worker is gone"):
            transfer.send(servers, model, 3)


def test_a_server_without_nccl(model):
    with serve(model) as served, pytest.raises(EngineError, match=r"init_weight.* not available.*vllm-serve --nccl"):
        NCCLTransfer(30, Wire).send([Server(served.url, timeout=30)], model, 1)


def test_bytes_that_never_arrive(model):
    with serving(Workers().app()) as served:
        transfer = NCCLTransfer(0.3, Stuck, BUFFER)
        with pytest.raises(
            EngineError, match=f"POST {served.url}/update_weights: weights sent over NCCL have not arrived"
        ):
            transfer.send([Server(served.url, timeout=30)], model, 1)


def test_servers_that_are_not_met(model):
    class Alone(Wire):
        def connect(self, world_size):
            threading.Event().wait(30)

    with serving(Workers().app()) as served:
        transfer = NCCLTransfer(0.3, Alone)
        with pytest.raises(EngineError, match=r"have not connected over NCCL within 0.3 seconds"):
            transfer.send([Server(served.url, timeout=30)], model, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_device(model):
    engine = ServerEngine("http://node-2:8000", sync_by="nccl")
    assert isinstance(engine.transfer, NCCLTransfer)
    with pytest.raises(EngineError, match="this process has none: leave out rollout_sync='nccl'"):
        NCCLCommunicator()


def test_checkpoints_with_other_names_are_refused(monkeypatch, model):
    monkeypatch.setattr(
        "trl.rollouts.packing.revert_weight_conversion",
        lambda model, state: {f"old.{name}": tensor for name, tensor in state.items()},
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM with the names and shapes of its checkpoints, which differ"):
        weights_meta(model)
