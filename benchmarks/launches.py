"""What a GPU will be asked to do, counted on a CPU: operations that launch kernels, bytes that they move, and flops.

    python benchmarks/launches.py [--bandwidth 4.27] [--rate 802] [--gap 2.9] [--launch 15] [--out launches.json]

A step of sampling and a step of training run on tensors that have shapes and no data, of models as large as they are;
kernels of Triton are counted and not run. Every operation that is not a view counts as one launch; a few of PyTorch's
launch two or three (cat, sort, cumulative sums), so the counts are a little low.

From the counts follow *predictions*, not measurements. An operation takes the longest of its bytes over the bandwidth
(TB/s), its flops over the rate (TFLOP/s), and the gap from kernel to kernel inside a CUDA graph (µs); outside of graphs the
host needs `--launch` µs for each. The defaults were measured on an H200. Launches of compiled layers are those that Inductor
plans, which is asked to plan and not to write code.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from as_on_cuda import FUNCTIONS
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.partitioners import min_cut_rematerialization_partition as min_cut
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode, FusedSchedulerNode, Scheduler, SchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from trl.data.layout import lay_out
from trl.models import varlen
from trl.models.compiled import compile_layers
from trl.models.fused import ROTATION, rms_norm
from trl.models.fused_adapters import fuse_adapters
from trl.models.half_weights import round_together
from trl.models.kept_activations import keep_less
from trl.models.score import score
from trl.models.score import unwrap as language_model
from trl.ops import triton_gate, triton_head, triton_rotary
from trl.rollouts import fused, fused_layers, fusions, triton_decode
from trl.rollouts.decoders import Sample
from trl.rollouts.engine import Prompt
from trl.rollouts.local import unwrap
from trl.rollouts.loop import Steps
from trl.rollouts.paged_decoder import PagedDecoder
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.shared_decoder import attention_windows
from trl.types import Completion, Example

HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14} | {
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32} | {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "0.5B": lambda **changed: Qwen2ForCausalLM._from_config(Qwen2Config(**HALF_B | changed)),
    "1B": lambda **changed: LlamaForCausalLM._from_config(LlamaConfig(**ONE_B | changed)),
}
SMALL = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
"""What kernels there are does not depend on: layers are compiled that narrow, with data."""
FREE = (
    "empty",
    "detach",
    "alias",
    "lift",
    "_local_scalar_dense",
    "item",
    "is_same_size",
    "sym_",
    "allclose",
    "set_",
    "device",
    "promote_types",
    "_unsafe_view",
)
"""Beginnings of the names of operations that launch nothing."""


@dataclass
class Counts(TorchDispatchMode):
    """Launches by name, and the bytes and flops of each launch in turn."""

    names: Counter[str] = field(default_factory=Counter)
    work: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "allclose":
            return True
        if name == "_local_scalar_dense":
            return 0.0 if args[0].is_floating_point() else 0
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not name.startswith(FREE):
            read, written = (
                {id(x): x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor)}
                for tree in ((args, kwargs), result)
            )
            flops = flop_registry.get(function.overloadpacket)
            self.add(name, sum((read | written).values()), flops(*args, **kwargs or {}, out_val=result) if flops else 0)
        return result

    def add(self, name: str, size: int, flops: int = 0) -> None:
        self.names[name] += 1
        self.work.append((size, flops))

    def milliseconds(self, bandwidth: float, rate: float, gap: float) -> float:
        """How long a device takes by the rule at the top of the file."""
        return sum(max(b / bandwidth / 1e9, f / rate / 1e9, gap / 1e3) for b, f in self.work)


def counting(counts: list[Counts]) -> Callable[..., None]:
    """In the place of the launcher of Triton's kernels: counts, and runs nothing. A kernel moves what its tensors hold, tables
    aside."""

    def launch(kernel: Any, grid: tuple[int, ...], *tensors: Any, **flags: Any) -> None:
        if counts:
            small = [x for x in tensors if isinstance(x, Tensor) and x.numel() < 2**24]
            counts[-1].add(kernel.fn.__name__, sum(x.numel() * x.element_size() for x in small))

    return launch


@contextmanager
def on_shapes(counts: list[Counts]) -> Iterator[None]:
    """Tensors have shapes alone, kernels are counted, and functions are those that CUDA would get."""
    patched = {(place, name): function for place, name, function in FUNCTIONS} | {
        **{(module, "launch"): counting(counts) for module in (triton_head, triton_decode, fused)},
        (triton_rotary, "rotate"): counted(triton_rotary.rotate, counts),
        (fusions, "rotate"): counted(triton_rotary.rotate, counts),
        (triton_gate, "gated"): counted(triton_gate.gated, counts),
        (fused_layers, "gated"): counted(triton_gate.gated, counts),
        (triton_gate, "gated_backward"): counted(triton_gate.gated_backward, counts),
    }
    before = [(module, name, getattr(module, name)) for module, name in patched]
    for (module, name), function in patched.items():
        setattr(module, name, function)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Counts():
            yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def counted(function: Callable[..., Any], counts: list[Counts]) -> Callable[..., Any]:
    """A function that launches nothing for tensors without data, as one kernel that reads and writes what it is given and gives."""

    def run(*given: Any, **options: Any) -> Any:
        found = function(*given, **options)
        if counts:
            sizes = [x.numel() * x.element_size() for x in tree_leaves((given, found)) if isinstance(x, Tensor)]
            counts[-1].add(function.__name__, sum(sizes))
        return found

    return run


@contextmanager
def fused_as_on_cuda(model: PreTrainedModel) -> Iterator[None]:
    """Norms and rotations of `trl.models.fused`, whose trials need data."""
    file = sys.modules[type(model).__module__]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)
    with patch.object(file, ROTATION, lambda *given: triton_rotary.Rotated.apply(*given, torch.bfloat16)):
        yield


@torch.library.custom_op("launches::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stands for attention where layers are compiled: what a compiler takes for one call."""
    return query.clone()


@torch.library.custom_op("launches::attend_backward", mutates_args=())
def attend_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return [query.clone(), key.clone(), value.clone()]


attend.register_fake(lambda query, key, value: torch.empty_like(query))
attend_backward.register_fake(lambda grad, *inputs: [torch.empty_like(x) for x in inputs])
attend.register_autograd(
    lambda ctx, grad: tuple(attend_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return attend(query, key, value)


def decode(make: Callable[[], PreTrainedModel], *, prompts: int = 8, n: int = 8, tokens: int = 256) -> Counts:
    """A step of sampling in bfloat16: `prompts · n` rows after prompts of so many tokens."""
    active: list[Counts] = []
    with on_shapes(active), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = make().eval()
        torch.set_default_dtype(torch.float32)
        policy, params = unwrap(model), SamplingParams(max_new_tokens=128, seed=0)
        rows = [Sample(p, i, Prompt([5] * tokens), 128) for p in range(prompts) for i in range(n)]
        windows = attention_windows(model)
        decoder = PagedDecoder(policy, windows, n, rows, budget=2**20, page=64, kernels=True)
        decoder.admit(rows)
        size = len(decoder.table[0])
        decoder.refresh(size)
        steps = Steps(policy, decoder, params, [], captures=False)
        with Counts() as counts:
            active.append(counts)
            steps._step(size, decoder.advance(1))
    return counts


def train(make: Callable[..., nn.Module], *, rows: int = 16, tokens: int = 350, **changed: Any) -> Counts:
    """Forward and backward of packed rows under autocast, as it is before layers are compiled."""
    active: list[Counts] = []
    examples = [Example([5] * (tokens // 2), (Completion([6] * (tokens // 2)),)) for _ in range(rows)]
    batch = lay_out(examples, "packed", capacity=rows * tokens, spans=True)
    with on_shapes(active), patch.object(nn.functional, "dropout", one_kernel):
        model = make(**changed).train()
        inner = language_model(model)
        varlen.switch(inner, varlen.VARLEN)
        round_together(inner)
        keep_less(inner)
        fake = batch.map(lambda x: torch.empty(x.shape, dtype=x.dtype))
        score(model, fake)
        with fused_as_on_cuda(inner), Counts() as counts, torch.autocast("cpu", torch.bfloat16):
            active.append(counts)
            (-score(model, fake).logprobs.mean()).backward()
    return counts


def one_kernel(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """Dropout as CUDA has it."""
    return torch.native_dropout(x, p, training)[0]


def adapted(make: Callable[..., PreTrainedModel], *, fuses: bool) -> nn.Module:
    """A model in bfloat16 with LoRA on all its products, in float32, as `peft` runs it or fused."""
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(make(dtype=torch.bfloat16), config, low_cpu_mem_usage=True)
    for module in model.modules():
        for name, x in [*module._parameters.items(), *module._buffers.items()]:
            if x is not None:
                dtype = torch.float32 if x.requires_grad else x.dtype
                here = torch.empty(x.shape, dtype=dtype, requires_grad=x.requires_grad)
                setattr(module, name, nn.Parameter(here, x.requires_grad) if name in module._parameters else here)
    if fuses:
        fuse_adapters(model)
    return model


def compiled_layer(make: Callable[..., PreTrainedModel]) -> Counter[str]:
    """Kernels of a decoder layer, forward and backward, as Inductor fuses its operations for any device; none is run.

    Products and attention are calls of libraries. Rounding of weights comes before what is compiled: a kernel each way.
    """
    found: Counter[str] = Counter({"_foreach_copy_": 2})

    def count(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        fused, mode = copy.deepcopy(graph), detect_fake_mode(inputs)
        with V.set_fake_mode(mode):
            post_grad_passes(fused, False)
            lowered = GraphLowering(fused, example_inputs=inputs, shape_env=mode.shape_env)
            with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
                lowered.run(*inputs)
                nodes = lowered.scheduler = Scheduler(lowered.operations)
        for node in nodes.nodes:
            if isinstance(node, ExternKernelSchedulerNode) and not isinstance(node.node, MultiOutput):
                found[str(node.node.python_kernel_name or node.node.op_overload)] += 1
            elif isinstance(node, (SchedulerNode, FusedSchedulerNode)):
                found["fused"] += 1
        return make_boxed_func(graph.forward)

    model = make(**SMALL, num_hidden_layers=1).train()
    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=count,
        inference_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        decompositions=select_decomp_table(),
        partition_fn=min_cut,
    )
    examples = [Example([5] * 20, (Completion([6] * 20),)) for _ in range(4)]
    with patch.object(varlen, "_has_kernel", lambda *_: True), patch.object(varlen, "varlen_attn", flash):
        varlen.switch(model, varlen.VARLEN)
        compile_layers(model, backend=backend)
        round_together(model)
        with torch.autocast("cpu", torch.bfloat16):
            (-score(model, lay_out(examples, "packed", capacity=400, spans=True)).logprobs.mean()).backward()
    return found


def train_compiled(make: Callable[..., PreTrainedModel], layers: int) -> tuple[int, Counter[str]]:
    """Launches of a step whose layers are compiled, and those of one layer."""
    one, two = (train(make, num_hidden_layers=n).names.total() for n in (1, 2))
    layer = compiled_layer(make)
    return one - (two - one) + layers * layer.total(), layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("bandwidth", 4.27), ("rate", 802.0), ("gap", 2.9), ("launch", 15.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--out", type=Path, default=Path("launches.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name, make in tqdm(MODELS.items(), disable=None):
        layers = HALF_B["num_hidden_layers"] if name == "0.5B" else ONE_B["num_hidden_layers"]
        one_fewer = partial(make, num_hidden_layers=layers - 1)
        kinds: dict[str, Callable[[Callable[..., PreTrainedModel]], Counts]] = {
            "decode": decode,
            "train": train,
            "train, LoRA": lambda make: train(partial(adapted, make, fuses=True)),
            "train, LoRA as peft runs it": lambda make: train(partial(adapted, make, fuses=False)),
        }
        for kind, count in kinds.items():
            counts = count(make)
            launches = counts.names.total()
            layer = launches - count(one_fewer).names.total()
            device = counts.milliseconds(options.bandwidth, options.rate, options.gap if kind == "decode" else 0)
            found = {"launches": launches, "a layer": layer, "device ms, predicted": device}
            found |= {"host ms, predicted": launches * options.launch / 1e3}
            found |= {"GB": sum(b for b, _ in counts.work) / 1e9, "TFLOP": sum(f for _, f in counts.work) / 1e12}
            result[f"{name} {kind}"] = found | {"names": dict(counts.names.most_common())}
            print(f"{name} {kind}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
            print("   ", ", ".join(f"{key} {value}" for key, value in counts.names.most_common(16)))
        launches, names = train_compiled(make, layers)
        result[f"{name} train, layers compiled"] = {
            "launches": launches,
            "a layer": names.total(),
            "names": dict(names),
        }
        print(f"{name} train, layers compiled: launches {launches}, a layer {names.total()}")
        print("   ", ", ".join(f"{key} {value}" for key, value in names.most_common()))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
