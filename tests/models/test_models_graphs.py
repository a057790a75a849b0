"""Replays of a model's layers: numbers and gradients are those of the layers, whatever was captured before.

CUDA's graphs are stood in for by functions that run again what was recorded, on the places that were recorded.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from trl.data.layout import few_sizes, lay_out
from trl.models.checkpointing import checkpoint_activations
from trl.models.graphs import (
    LAUNCH_BOUND_FLOPS,
    Graphs,
    capture_as,
    capture_layers,
    captures,
    graphs_of,
    without_graphs,
)
from trl.models.layer_sharing import recording, resuming
from trl.models.rewards import prepare_rewards, score_rewards
from trl.models.score import prepare_scoring, score, unwrap
from trl.models.value_heads.auto_models import with_value_head
from trl.models.value_heads.heads import ValueModel
from trl.models.value_heads.ilql import with_ilql_heads
from trl.models.varlen import VARLEN, switch
from trl.types import Completion, Example


def rows(*seeds, answers=2, prompt=5, answer=4):
    """Examples that differ in their tokens and not in their lengths."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def ids(draw, count):
        return torch.randint(5, 60, (count,), generator=draw).tolist()

    return [
        Example(ids(draw, prompt), tuple(Completion(ids(draw, answer + i)) for i in range(answers))) for draw in draws
    ]


def batch_of(*seeds, layout="packed", **sizes):
    return lay_out(rows(*seeds, **sizes), layout, capacity=2**40, spans=True, in_few_shapes=lambda n: True)


class Recorder:
    """Runs again what it was given; counts what it was given. Recording leaves no trace: CUDA runs no kernel meanwhile."""

    def __init__(self):
        self.recorded = self.replays = 0

    def __call__(self, function, pool):
        self.recorded += 1
        gradients = function.__self__.gradients
        before = {p: buffer.clone() for p, buffer in gradients.buffers.items()} if gradients else {}
        with torch.random.fork_rng():
            function()
        for parameter, values in before.items():
            gradients.buffers[parameter].copy_(values)

        def replay():
            self.replays += 1
            function()

        return replay, pool or object()


@pytest.fixture
def captured(make_model):
    """A model whose layers are recorded, the same model without, and the recorder."""

    def make(name="llama", **changes):
        model = make_model(name, **changes)
        prepare_scoring(model)
        switch(model, VARLEN)
        plain = copy.deepcopy(model)
        recorder = Recorder()
        capture_layers(model, recorder)
        return model, plain, recorder

    return make


def step(model, *batches, of=lambda model, batch: score(model, batch, want=["entropy"])):
    """Log-probabilities of batches, and the gradients of a function of them."""
    model.zero_grad()
    found = []
    for batch in batches:
        scores = of(model, batch)
        (scores.logprobs.square().sum() + scores.entropy.sum()).backward()
        found.append(scores.logprobs.detach())
    return found, {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# ---- sizes ----


def test_sizes_are_few_and_fill_up_an_eighth_at_most():
    assert [few_sizes(n) for n in (1, 64, 65, 1023, 1024, 1025, 5600, 8192, 8193)] == [
        64, 64, 128, 1024, 1024, 1152, 5632, 8192, 9216
    ]  # fmt: skip
    sizes = {few_sizes(n) for n in range(1, 2**15 + 1)}
    assert len(sizes) == 16 + 5 * 8
    assert all(few_sizes(n) <= n * 9 / 8 + 1 for n in range(1024, 2**15, 7))


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_batch_that_is_filled_up_has_the_numbers_of_padded_rows(make_model, name, layout):
    model = make_model(name)
    prepare_scoring(model)
    examples = [*rows(0, 1, answers=3), *rows(2, answers=1, prompt=1, answer=30), *rows(3, 4, 5, 6, prompt=13)]
    expected = step(model, lay_out(examples))
    expected = expected[0], {name: p.clone() for name, p in expected[1].items()}
    switch(model, VARLEN)
    batch = lay_out(examples, layout, capacity=2**40, spans=True, in_few_shapes=lambda n: True)
    spans, positions = batch.spans, batch.inputs["input_ids"].numel()
    assert positions == few_sizes(positions)
    assert spans.query_starts[-1] == positions
    assert len(spans.query_starts) == len(spans.key_starts) in (17, 33)
    assert spans.query_starts.diff().max() <= spans.longest_query
    assert spans.key_starts.diff().max() <= spans.longest_key
    keys = positions if spans.keys is None else len(spans.keys)
    assert spans.key_starts[-1] == keys == few_sizes(keys)
    found = step(model, batch)
    torch.testing.assert_close(found[0][0], expected[0][0], atol=2e-5, rtol=1e-5)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-4, rtol=1e-3)


def test_a_row_that_has_one_of_the_sizes_is_not_filled_up():
    spans = lay_out(
        rows(*range(8), answers=1, prompt=4, answer=4), "packed", capacity=2**40, spans=True, in_few_shapes=bool
    ).spans
    assert spans.query_starts.tolist() == spans.key_starts.tolist() == list(range(0, 65, 8))
    fewer = lay_out(
        rows(*range(5), answers=1, prompt=60, answer=4), "packed", capacity=2**40, spans=True, in_few_shapes=bool
    )
    assert fewer.spans.query_starts.tolist() == [0, 64, 128, 192, 256, 320, 320, 320, 320]  # three runs are empty


def test_padding_has_positions_that_a_table_has(make_model):
    batch = batch_of(0, answers=1, prompt=66)
    assert batch.inputs["input_ids"].shape == (1, 128)
    assert batch.inputs["position_ids"].max() == 69


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_rows_of_other_lengths_come_in_one_shape(layout):
    batches = [batch_of(*range(6), layout=layout, answer=answer) for answer in (3, 4, 5)]
    shapes = {
        (b.inputs["input_ids"].shape, b.spans.query_starts.shape, b.spans.keys is None or b.spans.keys.shape)
        for b in batches
    }
    assert len(shapes) == 1


# ---- replays ----


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_replays_have_the_numbers_and_gradients_of_layers(captured, name, layout):
    model, plain, recorder = captured(name)
    for number in range(4):
        batches = [batch_of(number, 10 + number, layout=layout), batch_of(20 + number, 30, layout=layout)]
        assert_same(step(model, *batches), step(plain, *batches))
    assert recorder.recorded == 2  # forward and backward, once
    assert recorder.replays > 8


def test_a_size_that_comes_first_in_the_middle_of_a_step(captured):
    model, plain, _ = captured()
    for number in range(4):
        batches = [batch_of(number, 1), batch_of(number, 2, answer=4 if number < 2 else 40)]
        assert_same(step(model, *batches), step(plain, *batches))


def test_weights_that_change_are_read_and_gradients_start_anew(captured):
    model, plain, _ = captured()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, plain)]
    for number in range(5):
        batch = batch_of(number, number + 1)
        assert_same(step(model, batch), step(plain, batch))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_zero_are_like_none(captured):
    """As `optimizer.zero_grad(set_to_none=False)` leaves them."""
    model, plain, recorder = captured()
    for parameter in (*model.parameters(), *plain.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    for number in range(4):
        for each in (model, plain):
            score(each, batch_of(number, 1)).logprobs.square().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        for each in (model, plain):
            each.zero_grad(set_to_none=False)
    assert recorder.recorded == 2


def test_gradients_may_be_dropped_between_forward_and_backward(captured):
    model, plain, recorder = captured()
    for number in range(3):
        batch = batch_of(number, 1)
        for each in (model, plain):
            each.zero_grad()  # no graph is tried while there are gradients
            loss = score(each, batch).logprobs.square().sum()
            each.zero_grad()
            loss.backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert recorder.replays > 0


def test_a_forward_without_backward_leaves_gradients_as_they_were(captured):
    """Zeros in place of none would have an optimizer decay weights, and go on with its momentum."""
    model, _, recorder = captured()
    batch = batch_of(0, 1)
    for _ in range(2):
        step(model, batch)
    model.zero_grad()
    replays = recorder.replays
    score(model, batch)
    assert recorder.replays == replays + 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_capture_has_its_own_nodes_for_the_gradients_of_weights(make_model):
    """Those of training, which DDP keeps, belong to the stream of training, which backward would wait for within the capture."""
    model = make_model("llama")
    prepare_scoring(model)
    switch(model, VARLEN)
    kept, walked = [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()], []

    class Watching(Recorder):
        def __call__(self, function, pool):
            if function.__name__ == "_backward":
                walked.append(nodes_below(function.__self__.hidden.grad_fn))
            return super().__call__(function, pool)

    plain, recorder = copy.deepcopy(model), Watching()
    capture_layers(model, recorder)
    for number in range(3):
        assert_same(step(model, batch_of(number, 1)), step(plain, batch_of(number, 1)))
    (nodes,) = walked
    assert len(nodes) > len(kept)
    assert not nodes & set(kept)


def nodes_below(node):
    """The nodes of an autograd graph."""
    found, following = set(), [node]
    while following:
        if (node := following.pop()) is not None and node not in found:
            found.add(node)
            following += [parent for parent, _ in node.next_functions]
    return found


def test_several_sizes_with_and_without_gradient(captured):
    model, plain, recorder = captured()
    for number in range(3):
        for answer in (4, 40):
            batch = batch_of(number, 7, answer=answer)
            assert_same(step(model, batch), step(plain, batch))
            with torch.no_grad():
                torch.testing.assert_close(score(model, batch).logprobs, score(plain, batch).logprobs)
    # The larger size takes the memory of the smaller one, which is captured again.
    assert recorder.recorded == 3 * 2 + 3


def test_a_forward_before_the_backward_of_another_is_no_replay(captured):
    model, plain, _ = captured()
    for number in range(3):
        first, second = batch_of(number, 1), batch_of(number, 2)
        for each in (model, plain):
            each.zero_grad()
            one, two = score(each, first).logprobs, score(each, second).logprobs
            (one.square().sum() + 2 * two.square().sum()).backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_a_second_backward_is_refused(captured):
    model, plain, _ = captured()
    batch = batch_of(0, 1)
    for _ in range(2):
        step(model, batch)
    for each in (model, plain):
        each.zero_grad()
        loss = score(each, batch).logprobs.square().sum()
        loss.backward(retain_graph=True)
        if each is model:
            with pytest.raises(RuntimeError, match="a second time.*cuda_graphs=False"):
                loss.backward()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_inference_mode_leaves_nothing_that_other_passes_cannot_write(captured):
    model, plain, recorder = captured()
    batch = batch_of(0, 1)
    for mode in (torch.inference_mode, torch.no_grad):
        for _ in range(3):
            with mode():
                torch.testing.assert_close(score(model, batch).logprobs, score(plain, batch).logprobs)
    assert recorder.recorded == 1


def test_layers_that_are_watched_run(captured):
    model, _, recorder = captured()
    batch = batch_of(0, 1)
    for _ in range(3):
        step(model, batch)
    replays, seen = recorder.replays, []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    step(model, batch)
    assert (len(seen), recorder.replays) == (1, replays)
    hook.remove()
    step(model, batch)
    assert (len(seen), recorder.replays) == (1, replays + 2)


def test_what_waits_for_gradients_of_weights_is_called(captured):
    """Optimizers that step layer by layer in backward, for example."""
    model, _, recorder = captured()
    batch, called = batch_of(0, 1), []
    for _ in range(2):
        step(model, batch)
    model.model.norm.weight.register_post_accumulate_grad_hook(called.append)
    replays = recorder.replays
    step(model, batch)
    assert (len(called), recorder.replays) == (1, replays)


def test_adapters_that_are_switched_off_are_not_those_that_are_on(captured):
    model, plain, _ = captured()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.2)
    config.task_type = "CAUSAL_LM"  # its class hands further arguments down
    adapted, beside = [], []
    for each in (model, plain):
        torch.manual_seed(0)
        adapted.append(get_peft_model(each, copy.deepcopy(config)))
    recorder = Recorder()
    capture_layers(model, recorder)
    for number in range(4):
        batch = batch_of(number, 1)
        for each in adapted:
            each.train()
            torch.manual_seed(number)
            beside.append(step(each, batch))
            each.eval()
            with torch.no_grad(), each.disable_adapter():
                beside.append(([score(each, batch).logprobs], {}))
        assert_same(beside[-4], beside[-2])
        assert_same(beside[-3], beside[-1])
    assert recorder.recorded == 2 + 1


@pytest.fixture
def adapted(captured):
    """A model with an adapter, after a step that was captured; its recorder, and a batch."""
    model, _, _ = captured()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.2)
    config.task_type = "CAUSAL_LM"
    outer = get_peft_model(model, config).train()
    recorder, batch = Recorder(), batch_of(0, 1)
    capture_layers(model, recorder)
    for _ in range(2):
        step(outer, batch)
        with torch.no_grad():
            score(outer, batch)
    assert recorder.recorded == 3
    return outer, recorder, batch


def merge(adapted):
    adapted.merge_adapter()


def scale(adapted):
    adapted.base_model.model.model.layers[1].self_attn.q_proj.set_scale("default", 3)


def drop(adapted):
    adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_dropout["default"].p = 0.5


def evaluate_one(adapted):
    adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_dropout.eval()


@pytest.mark.parametrize("change", [merge, scale, drop, evaluate_one])
def test_what_python_reads_of_adapters_belongs_to_a_graph(adapted, change):
    """A graph of CUDA has it as it was when it was captured."""
    outer, recorder, batch = adapted
    change(outer)
    with torch.no_grad():
        score(outer, batch)
    assert recorder.recorded == 4


def test_modules_that_are_added_are_looked_at_anew(captured):
    model, _, recorder = captured()
    batch = batch_of(0, 1)
    for _ in range(2):
        step(model, batch)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    replays = recorder.replays
    model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    for _ in range(3):
        step(model, batch)
    assert recorder.replays == replays


@pytest.mark.parametrize("drop", [True, False], ids=["no gradients", "gradients"])
def test_weights_of_another_size_or_precision_have_new_gradients(captured, drop):
    """Gradients that a weight still has are changed along with it."""
    model, plain, recorder = captured()
    batch = batch_of(0, 1)
    for dtype in (torch.float32, torch.float64, torch.float32):
        if drop:
            model.zero_grad()
        model.to(dtype), plain.to(dtype)
        for _ in range(3):
            assert_same(step(model, batch), step(plain, batch))
    assert recorder.recorded == 3 * 2
    assert captures(model, 1)


def test_embeddings_that_adapters_let_learn_are_not_weights(captured):
    model, plain, recorder = captured()
    for each in (model, plain):
        each.requires_grad_(False)
        each.model.layers[1].requires_grad_(True)
        each.enable_input_require_grads()
    batch = batch_of(0, 1)
    for _ in range(3):
        assert_same(step(model, batch), step(plain, batch))
    assert recorder.recorded == 2
    assert set(graphs_of(model).gradients.buffers) == set(model.model.layers[1].parameters()) | {
        p for p in model.model.norm.parameters() if p.requires_grad
    }


def test_weights_that_are_frozen_later_get_no_gradient(captured):
    model, plain, _ = captured()
    batch = batch_of(0, 1)
    for frozen in (False, True):
        for each in (model, plain):
            each.model.layers[0].requires_grad_(not frozen)
        for _ in range(3):
            assert_same(step(model, batch), step(plain, batch))


def test_checkpointed_layers_are_captured(captured):
    model, plain, recorder = captured()
    checkpoint_activations(model, {"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    for number in range(3):
        batch = batch_of(number, 1)
        assert_same(step(model, batch), step(plain, batch))
    assert recorder.recorded == 2


def test_a_reward_model_is_captured(make_model):
    model = LlamaForSequenceClassification(make_model("llama", num_labels=1).config).eval()
    prepare_rewards(model)
    switch(model, VARLEN)
    plain, recorder = copy.deepcopy(model), Recorder()
    capture_layers(model, recorder)
    for number in range(3):
        batch = batch_of(number, 1, layout="shared")
        for each in (model, plain):
            each.zero_grad()
            score_rewards(each, batch).square().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert recorder.recorded == 2


def with_values(model, kind):
    """The model with a value head of this kind, in training mode; the dropout of the head is not part of a graph."""
    torch.manual_seed(3)
    if kind == "ilql":
        return with_ilql_heads(model).train()
    wrapped = with_value_head(model)
    if kind == "network":
        network = copy.deepcopy(model.model).requires_grad_(True)
        wrapped.v_head = ValueModel(network, wrapped.head_options)
    return wrapped.train()


@pytest.mark.parametrize("kind", ["head", "network", "ilql"])
def test_values_are_those_of_layers(captured, kind):
    model, plain, recorder = captured()
    pair = [with_values(each, kind) for each in (model, plain)]
    if kind == "network":
        capture_as(pair[0].v_head.model, model)

    def of(wrapped, batch):
        scores = score(wrapped, batch, want=["entropy", "value", *(["q"] if kind == "ilql" else [])])
        more = sum(value.square().sum() for value in (scores.value, *scores.extras.values()))
        return replace(scores, entropy=scores.entropy + more)

    for number in range(4):
        batches, found = [batch_of(number, 10 + number), batch_of(20 + number, 30)], []
        for wrapped in pair:
            torch.manual_seed(number)
            found.append(step(wrapped, *batches, of=of))
        assert_same(*found)
        with torch.no_grad():
            values = [score(wrapped.eval(), batches[0], want=["value"]).value for wrapped in pair]
            torch.testing.assert_close(*values)
    networks = 1 + (kind == "network")
    assert recorder.recorded == 3 * networks
    assert recorder.replays > 8 * networks


def test_values_of_layers_on_lower_layers_are_computed_by_layers(captured):
    model, plain, recorder = captured()
    pair = [with_value_head(each, num_value_layers=1) for each in (model, plain)]
    for number in range(3):
        batch = batch_of(number, 1)
        found = [step(each, batch, of=lambda m, b: score(m, b, want=["entropy", "value"])) for each in pair]
        assert_same(*found)
    assert recorder.recorded == 0


def test_gradients_can_be_asked_of_autograd_without_graphs(captured):
    model, plain, recorder = captured()
    batch = batch_of(0, 1)
    for _ in range(2):
        step(model, batch)
    replays = recorder.replays
    with without_graphs(model):
        found = torch.autograd.grad(score(model, batch).logprobs.sum(), list(model.parameters()))
    expected = torch.autograd.grad(score(plain, batch).logprobs.sum(), list(plain.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert recorder.replays == replays
    step(model, batch)
    assert recorder.replays > replays


def test_a_model_that_is_resumed_from_lower_layers_is_not_replayed(captured):
    model, plain, _ = captured()
    for number in range(3):
        batch, found = batch_of(number, 1), []
        for each in (model, plain):
            with torch.no_grad():
                with recording(each, 1) as lower:
                    score(each, batch)
                with resuming(each, 1, lower):
                    found.append(score(each, batch).logprobs)
        torch.testing.assert_close(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("case", ["full", "checkpointed", "adapter with dropout"])
def test_graphs_of_cuda_have_the_numbers_of_layers(make_model, case):
    pair = []
    for captures_layers in (True, False):
        model = make_model("llama").cuda()
        prepare_scoring(model)
        switch(model, VARLEN)
        outer = model
        if case == "adapter with dropout":
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3)
            torch.manual_seed(0)
            outer = get_peft_model(model, config)
        if case == "checkpointed":
            checkpoint_activations(model, {"use_reentrant": False, "preserve_rng_state": False})
        if captures_layers:
            capture_layers(model)
        pair.append(outer.train())
    for number in range(6):
        batch, found = batch_of(number, 1, answer=4 + 40 * (number % 2)).to("cuda"), []
        for each in pair:
            torch.manual_seed(number)
            with torch.autocast("cuda", torch.bfloat16):
                scores = score(each, batch)
            each.zero_grad()
            scores.logprobs.square().sum().backward()
            found.append([scores.logprobs.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
    assert graphs_of(unwrap(pair[0])).count == 2


def test_copies_and_pickles_have_no_graphs(captured):
    model, _, _ = captured()
    batch = batch_of(0, 1)
    for _ in range(2):
        step(model, batch)
    assert graphs_of(copy.deepcopy(model)) is None
    assert pickle.loads(pickle.dumps(graphs_of(model))) is None
    other = copy.deepcopy(model)
    capture_as(other, model)
    assert isinstance(graphs_of(other), Graphs)


# ---- what cannot be captured ----


def test_layers_that_cannot_be_captured_run_and_are_named_once(captured, caplog):
    model, plain, _ = captured()

    def refuse(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    capture_layers(model, refuse)
    for number in range(4):
        batch = batch_of(number, 1)
        assert_same(step(model, batch), step(plain, batch))
    (record,) = caplog.records
    assert "LlamaModel runs without CUDA graphs" in record.message
    assert "not permitted" in record.message


def test_a_model_that_is_its_own_decoder_runs(captured, caplog):
    _, model, _ = captured()
    model.get_decoder = lambda: model
    capture_layers(model, Recorder())
    assert "not apart" in caplog.text
    assert graphs_of(model) is None
    assert score(model, batch_of(0)).logprobs.any()


def test_a_backward_that_cannot_be_captured_leaves_no_hooks(captured):
    model, plain, _ = captured()

    def refuse(function, pool):
        function()
        if function.__name__ == "_forward":
            owner = function.__self__
            owner.hidden.register_hook(lambda grad: grad.view(0))  # raises a RuntimeError
        return function, "pool"

    capture_layers(model, refuse)
    for number in range(4):
        batch = batch_of(number, 1)
        assert_same(step(model, batch), step(plain, batch))
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(("wrong", "word"), [("forward", "hidden states"), ("backward", "gradients")])
def test_replays_with_other_numbers_are_not_used(captured, caplog, wrong, word):
    model, plain, _ = captured()

    def record(function, pool):
        def replay():
            function()
            owner = function.__self__
            if function.__name__ == f"_{wrong}":
                target = owner.hidden.data if wrong == "forward" else owner.gradients.buffers[owner.learned[0]]
                target.mul_(1.5)

        function()
        return replay, "pool"

    capture_layers(model, record)
    for number in range(3):
        batch = batch_of(number, 1)
        assert_same(step(model, batch), step(plain, batch))
    (record,) = caplog.records
    assert word in record.message


def test_only_what_the_host_cannot_keep_up_with_is_worthwhile(captured):
    model, plain, _ = captured()
    weights = sum(p.numel() for p in model.model.layers[0].parameters())
    assert captures(model, int(0.99 * LAUNCH_BOUND_FLOPS / 6 / weights))
    assert not captures(model, int(1.01 * LAUNCH_BOUND_FLOPS / 6 / weights))
    assert not captures(plain, 1)
