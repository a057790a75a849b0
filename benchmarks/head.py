"""The head, forward and backward: log-probability and entropy of M tokens from hidden states, in several ways.

    python benchmarks/head.py --device cuda --tokens 6000,24000 --trl-python trl-env/bin/python [--out head.json]
    python benchmarks/head.py --device cpu --tokens 512 --vocabulary 32000 --width 256 --dtype float32

ours        `trl.ops.logprobs.logprobs_from_linear`: on CUDA its kernels
ours-2^P    the same kernels with tiles of 2^P logits, for each P of `--tiles`: small ones stay in the device's cache, and
            are more launches
ours-torch  the same without kernels
plain       all logits at once, by autograd
products    the three matrix products that no way can do without: the floor
trl         TRL's `ChunkedLogProbFunction`, run by the interpreter that is given

Weights are float32 and products run in `--dtype` by autocast, as in training. Ways take turns, one call each per round;
the medians are reported, the memory beside inputs (peak, CUDA alone), and the error of the log-probabilities of the first
tokens against float64 on the same rounded factors. A way that runs out of memory is left out. Every result is on disk
when it is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKED = 64
"""Tokens whose log-probabilities are compared with float64."""

Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(hidden [M,H], weight [V,H], target [M])` to log-probabilities and entropies `[M]`."""


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from trl.ops.logprobs import logprobs_from_linear

    found = logprobs_from_linear(hidden, weight, None, target, want=frozenset({"entropy"}))
    return found["logprobs"], found["entropy"]


def ours_in_tiles(power: int) -> Way:
    """Ours on CUDA with tiles of 2^power logits, in backward too."""
    from trl.ops import triton_head

    def way(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        triton_head.TILE_ELEMENTS = 2**power
        return ours(hidden, weight, target)

    return way


def ours_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from trl.ops import logprobs
    from trl.ops.logits import LogitTransform

    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    want, transform = frozenset({"entropy"}), LogitTransform()
    return logprobs._LinearLogprobs.apply(hidden, weight, None, target, want, transform, dtype)[:2]


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, size, None, 1.0, ("entropy",))[:2]


WAYS: dict[str, Way] = {"ours": ours, "ours-torch": ours_torch, "plain": plain, "trl": trl}


class Problem:
    """Leaves and targets of one size, and how long ways take with them."""

    def __init__(self, tokens: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        self.hidden = torch.randn(tokens, width, **options).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, **options) * 3 / width**0.5).requires_grad_()
        self.target = torch.randint(0, vocabulary, (tokens,), **options)
        self.dtype, self.device = dtype, device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def call(self, way: Way) -> Tensor:
        """Forward and backward; the log-probabilities."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logprobs, entropy = way(self.hidden, self.weight, self.target)
        (logprobs.mean() + 0.01 * entropy.mean()).backward()
        return logprobs.detach()

    def products(self) -> None:
        hidden, weight = self.hidden.detach().to(self.dtype), self.weight.detach().to(self.dtype)
        for first in range(0, len(hidden), 4096):
            part = hidden[first : first + 4096]
            logits = part @ weight.T
            logits @ weight
            logits.T @ part

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def peak_mib(self, run: Callable[[], Any]) -> float | None:
        """Memory beside what is held already."""
        if self.device.type != "cuda":
            return None
        self.hidden.grad = self.weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def error(self, logprobs: Tensor) -> float:
        hidden, weight = (x.detach().to(self.dtype).double() for x in (self.hidden[:CHECKED], self.weight))
        exact = torch.log_softmax(hidden @ weight.T, -1).gather(1, self.target[:CHECKED, None])[:, 0]
        return (logprobs[:CHECKED].double() - exact).abs().max().item()


def measure(problem: Problem, ways: dict[str, Way], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds, memory and error by way; the first call of each, which compiles, is not counted."""
    result: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {"products": problem.products}
    for name, way in ways.items():
        calls[name] = lambda way=way: problem.call(way)
        try:
            error = problem.error(calls[name]())
            result[name] = {"error": error, "peak_mib": problem.peak_mib(calls[name])}
        except torch.OutOfMemoryError:
            del calls[name]
    problem.products()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(problem.seconds(call))
    for name, found in times.items():
        result.setdefault(name, {})["ms"] = 1e3 * statistics.median(found)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--tokens", default="6000,24000")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--ways", default="ours,ours-torch,plain")
    parser.add_argument("--tiles", default="", help="logarithms of sizes of tiles to try besides: 22,23,24,26")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL; without it TRL is left out")
    parser.add_argument("--out", type=Path, default=Path("head.json"))
    return parser.parse_args()


def asked(arguments: argparse.Namespace) -> dict[str, Way]:
    """The ways to measure. Those of several sizes of tiles each set their own, which stays: ours goes by the default's."""
    ways = {name: WAYS[name] for name in arguments.ways.split(",")}
    if not arguments.tiles:
        return ways
    from trl.ops import triton_head

    default = triton_head.TILE_ELEMENTS.bit_length() - 1
    powers = {f"ours-2^{power}": int(power) for power in arguments.tiles.split(",")}
    return {**ways, "ours": ours_in_tiles(default), **{name: ours_in_tiles(power) for name, power in powers.items()}}


def by_trl(arguments: argparse.Namespace, tokens: int) -> dict[str, dict[str, Any]]:
    """What the other interpreter measures of TRL and of the floor, which says whether the machine was the same."""
    out = arguments.out.with_suffix(".trl.json")
    command = [arguments.trl_python, __file__, "--ways", "trl", "--tokens", str(tokens), "--out", str(out)]
    for name in ("device", "vocabulary", "width", "dtype", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = json.loads(out.read_text())["tokens"][str(tokens)]
    out.unlink()
    return {"trl": found["trl"], "products beside trl": found["products"]}


def main() -> None:
    arguments = parse()
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    settings = {name: getattr(arguments, name) for name in ("vocabulary", "width", "dtype", "rounds")}
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "settings": settings, "tokens": {}}
    ways = asked(arguments)
    for tokens in map(int, arguments.tokens.split(",")):
        dtype = getattr(torch, arguments.dtype)
        problem = Problem(tokens, arguments.vocabulary, arguments.width, dtype, device)
        found = measure(problem, ways, arguments.rounds)
        del problem
        if arguments.trl_python:
            found |= by_trl(arguments, tokens)
        result["tokens"][str(tokens)] = found
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        for way, numbers in found.items():
            memory = f"{numbers['peak_mib']:8.0f} MiB" if numbers.get("peak_mib") is not None else ""
            error = f"  error {numbers['error']:.1e}" if "error" in numbers else ""
            print(f"{tokens:7d} tokens  {way:20s} {numbers['ms']:9.2f} ms {memory}{error}")


if __name__ == "__main__":
    main()
