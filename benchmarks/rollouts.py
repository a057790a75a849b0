"""The built-in rollout engine against `model.generate`, the same work on both sides, in one run.

    python benchmarks/rollouts.py [--rounds 5] [--threads 2] [--prompts 8] [--samples 8] [--prompt_tokens 400]

A Llama of 15 M parameters (hidden 256, 6 layers, 32,000 tokens) continues each prompt several times; completions end
at random (3 % of the vocabulary are stop tokens) between 8 and 64 tokens. `generate` is made to stop where the engine
stopped, row by row, so that both sample the same number of tokens. Rounds alternate; the ratio of medians is reported,
with the engine's time by part.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from trl.rollouts.decoders import SharedDecoder
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampler import Sampler
from trl.rollouts.sampling import SamplingParams

VOCABULARY, SHORTEST, LONGEST, STOP_SHARE = 32_000, 8, 64, 0.03


class StopAt(StoppingCriteria):
    """Row i stops after `lengths[i]` new tokens."""

    def __init__(self, before: int, lengths: list[int]) -> None:
        self.before, self.lengths = before, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] - self.before >= self.lengths


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


def by_engine(engine: LocalEngine, ids: torch.Tensor, samples: int, seed: int) -> list[list[Rollout]]:
    stops = tuple(range(int(VOCABULARY * STOP_SHARE)))
    params = SamplingParams(max_new_tokens=LONGEST, min_new_tokens=SHORTEST, stop_token_ids=stops, seed=seed)
    return engine.generate([Prompt(row) for row in ids.tolist()], params, samples)


def by_generate(model: LlamaForCausalLM, ids: torch.Tensor, samples: int, lengths: list[int]) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=LONGEST,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([StopAt(ids.shape[1], lengths)]),
    )


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


def parts(model: LlamaForCausalLM, call: Callable[[], object]) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("threads", 2), ("prompts", 8), ("samples", 8), ("prompt_tokens", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = llama()
    engine = LocalEngine(model, progress=False)
    ids = torch.randint(1_000, VOCABULARY, (args.prompts, args.prompt_tokens))
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        marks = [{name: clock() for name, clock in clocks.items()}]
        rollouts = by_engine(engine, ids, args.samples, number)
        marks.append({name: clock() for name, clock in clocks.items()})
        lengths = [len(rollout) for samples in rollouts for rollout in samples]
        by_generate(model, ids, args.samples, lengths)
        marks.append({name: clock() for name, clock in clocks.items()})
        for name in clocks if number else ():
            seconds["engine", name].append(marks[1][name] - marks[0][name])
            seconds["generate", name].append(marks[2][name] - marks[1][name])
    print(f"{sum(lengths)} tokens in {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")
    for name in clocks:
        ours, theirs = (statistics.median(seconds[side, name]) for side in ("engine", "generate"))
        print(f"engine {ours:.2f} s, generate {theirs:.2f} s of {name} time: {ours / theirs:.3f}")
    for part, share in parts(model, lambda: by_engine(engine, ids, args.samples, 0)).items():
        print(f"  {part:20s} {share:.3f}")


if __name__ == "__main__":
    main()
