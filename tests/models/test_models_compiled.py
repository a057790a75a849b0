"""Compiled layers: the numbers of plain ones, with one graph for layers and lengths."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl.data.layout import lay_out
from trl.errors import ConfigError
from trl.models.checkpointing import checkpoint_activations
from trl.models.compiled import compile_layers, repeated_layers
from trl.models.score import score
from trl.models.varlen import VARLEN, switch
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion, Example

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at it


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(*lengths):
    return [Example([5] * n, (Completion([6, 7, 8]), Completion([9, 10]))) for n in lengths]


def numbers(model, batch):
    """Log-probabilities, and the gradient of the first trained parameter."""
    model.zero_grad()
    logprobs = score(model, batch).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), next(p.grad for p in model.parameters() if p.grad is not None).clone()


@pytest.mark.parametrize("spans", [False, pytest.param(True, marks=pytest.mark.long)], ids=["masks", "spans"])
def test_numbers_are_those_of_plain_layers_and_graphs_are_few(make_model, spans):
    """Batches of several widths and counts: after the first two, nothing is compiled any more."""
    model, graphs = make_model("llama"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batches = [lay_out(rows(*n), "shared", capacity=90, spans=spans) for n in ((9, 4), (12,), (20, 3, 5), (11, 12))]
    if spans:
        switch(model, VARLEN)
    expected = [numbers(model, batch) for batch in batches]
    assert compile_layers(model, backend=backend) == 2
    found = [numbers(model, batch) for batch in batches[:2]]
    made = len(graphs)
    found += [numbers(model, batch) for batch in batches[2:]]
    torch.testing.assert_close(found, expected)
    assert made > 0
    if not spans:  # run by run, as a CPU attends to spans, a graph ends at each of their bounds
        assert len(graphs) == made


def test_adapters_and_checkpointing_work_with_it(make_model):
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    batch = lay_out(rows(9, 4), "packed", capacity=60)
    expected = numbers(model, batch)
    checkpoint_activations(model.get_base_model())
    compile_layers(model.get_base_model(), backend="eager")
    torch.testing.assert_close(numbers(model, batch), expected)


def test_sampling_runs_plain_layers(make_model):
    model, ran = make_model("llama"), []
    prompts, params = [Prompt([5, 6, 7])], SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    expected = LocalEngine(model).generate(prompts, params, 1)

    def backend(graph, inputs):
        ran.append(graph)
        return graph.forward

    compile_layers(model, backend=backend)
    assert LocalEngine(model).generate(prompts, params, 1) == expected
    assert not ran


def test_names_of_weights_stay(make_model):
    model = make_model("llama")
    before = list(model.state_dict())
    compile_layers(model, backend="eager")
    assert list(model.state_dict()) == before
    assert len(repeated_layers(model)) == 2


def test_an_architecture_without_layers_is_an_error(make_model, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(type(model), "_no_split_modules", None)
    monkeypatch.setattr(model, "_no_split_modules", None, raising=False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not declare its layers"):
        compile_layers(model)
