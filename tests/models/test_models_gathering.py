"""Memory of gathering weights that two processes share: the other process is one that answers at once, with anything."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import MODELS
from trl.rollouts.weight_sync import write_weights


class Alive(TorchDispatchMode):
    """Bytes of what was made within it and is still held, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self.seen:
                    self.seen.add(storage)
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@pytest.fixture
def two_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("main", [True, False])
def test_a_process_holds_one_layer_beyond_what_it_keeps(two_processes, adapter, main, tmp_path):
    model = MODELS["llama"](num_hidden_layers=8)
    layers = model.model.layers
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())  # noqa: E731
    weights, layer = size(model), max(size(layers[0]), size(model.lm_head))
    assert weights > 8 * layer
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for module in (*layers, model):
        fully_shard(module)
    with Alive() as alive:
        write_weights(model, tmp_path / "weights" if main else None)
    assert alive.most > layer / 20
    assert alive.most <= layer + weights * main
