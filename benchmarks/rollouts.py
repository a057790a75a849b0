"""The built-in rollout engine against `model.generate`, the same work on both sides, in one run.

    python benchmarks/rollouts.py [--rounds 5] [--threads 2] [--prompts 8] [--samples 8] [--prompt_tokens 400]
    python benchmarks/rollouts.py --device cuda --shape 0.5B --prompt_tokens 256 --longest 128 --stop_share 0

A model (by default a Llama of 15 M parameters: hidden 256, 6 layers, 32,000 tokens) continues each prompt several times;
completions end at random (3 % of the vocabulary are stop tokens) between 8 and 64 tokens, or all at `--longest` with a
share of 0. `generate` is made to stop where the engine stopped, row by row, so that both sample the same number of tokens.
Rounds alternate; the ratio of medians is reported, on a CPU with the engine's time by part, on CUDA with milliseconds and
launches per token. On CUDA, models are in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import gpu_workloads
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampler import Sampler
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.shared_decoder import SharedDecoder

VOCABULARY, SHORTEST = 32_000, 8


class StopAt(StoppingCriteria):
    """Row i stops after `lengths[i]` new tokens."""

    def __init__(self, before: int, lengths: list[int]) -> None:
        self.before, self.lengths = before, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] - self.before >= self.lengths.to(input_ids.device)


@dataclass(frozen=True)
class Work:
    """What both sides do: prompts `[P,T]`, each continued `samples` times by at most `longest` tokens."""

    model: PreTrainedModel
    prompts: torch.Tensor
    samples: int
    longest: int
    stop_share: float

    def by_engine(self, engine: LocalEngine, seed: int) -> list[int]:
        """Lengths of the samples, in the order of prompts."""
        stops = tuple(range(int(VOCABULARY * self.stop_share)))
        least = SHORTEST if stops else self.longest
        params = SamplingParams(
            max_new_tokens=self.longest, min_new_tokens=least, stop_token_ids=stops, ignore_eos=True, seed=seed
        )
        found = engine.generate([Prompt(row) for row in self.prompts.tolist()], params, self.samples)
        return [len(rollout) for samples in found for rollout in samples]

    def by_generate(self, lengths: list[int]) -> None:
        ids = self.prompts.to(self.model.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=self.samples,
            max_new_tokens=self.longest,
            min_new_tokens=SHORTEST,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([StopAt(ids.shape[1], lengths)]),
        ).tolist()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def model_of(shape: str, device: str) -> PreTrainedModel:
    """The model of a shape of `gpu_workloads.py`, or the small Llama; nothing ends a sequence but stop tokens."""
    model = llama() if shape == "15M" else gpu_workloads.model(shape, seed=0, device=device).eval()
    model.generation_config.eos_token_id = None
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


class Stopwatch:
    """Adds up the seconds spent in functions while they are wrapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: object, name: str, part: str) -> Callable[[], None]:
        function = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, function)


def parts(model: PreTrainedModel, call: Callable[[], object]) -> dict[str, float]:
    """Share of the engine's time by part."""
    watch = Stopwatch()
    undo = [
        watch.wrap(SharedDecoder, "admit", "prefill"),
        watch.wrap(SharedDecoder, "step", "step"),
        watch.wrap(SharedDecoder, "keep", "compaction"),
        watch.wrap(Sampler, "sample", "sampling"),
        watch.wrap(model.lm_head, "forward", "head"),
    ]
    start = time.perf_counter()
    call()
    total = time.perf_counter() - start
    for restore in undo:
        restore()
    watch.seconds["decode without head"] = watch.seconds.pop("step") - watch.seconds["head"]
    return {part: seconds / total for part, seconds in watch.seconds.items()} | {"total seconds": total}


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that the device ran, those of a graph counted one by one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("threads", 2), ("prompts", 8), ("samples", 8), ("prompt_tokens", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("15M", *gpu_workloads.SHAPES), default="15M")
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--stop_share", type=float, default=0.03)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = model_of(args.shape, args.device)
    engine = LocalEngine(model, progress=False)
    prompts = torch.randint(1_000, model.config.vocab_size, (args.prompts, args.prompt_tokens))
    work = Work(model, prompts, args.samples, args.longest, args.stop_share)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        marks = [{name: clock() for name, clock in clocks.items()}]
        lengths = work.by_engine(engine, number)
        marks.append({name: clock() for name, clock in clocks.items()})
        work.by_generate(lengths)
        marks.append({name: clock() for name, clock in clocks.items()})
        for name in clocks if number else ():
            seconds["engine", name].append(marks[1][name] - marks[0][name])
            seconds["generate", name].append(marks[2][name] - marks[1][name])
    print(f"{sum(lengths)} tokens in {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")
    for name in clocks:
        ours, theirs = (statistics.median(seconds[side, name]) for side in ("engine", "generate"))
        print(f"engine {ours:.2f} s, generate {theirs:.2f} s of {name} time: {ours / theirs:.3f}")
    if args.device == "cuda":
        for side, call in (
            ("engine", lambda: work.by_engine(engine, 0)),
            ("generate", lambda: work.by_generate(lengths)),
        ):
            step = 1e3 * statistics.median(seconds[side, "wall"]) / args.longest
            print(f"  {side:10s} {step:7.2f} ms and {launches(call) / args.longest:6.0f} launches per token")
        return
    for part, share in parts(model, lambda: work.by_engine(engine, 0)).items():
        print(f"  {part:20s} {share:.3f}")


if __name__ == "__main__":
    main()
