"""vLLM in this process, with weights of several steps: what it samples, as JSON. Run by the Python of an environment with vLLM.

python sample_in_process.py FOLDER TEMPERATURE [TENSOR_PARALLEL_SIZE]       also as one of several processes
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from torch import distributed

from tests.conftest import make_tokenizer
from tests.vllm.support import OPTIONS, PARAMS, PROMPTS, largest_difference, llama
from trl.rollouts.vllm import VLLMEngine


def main(folder: Path, temperature: float, tensor_parallel_size: int = 1) -> None:
    warnings.simplefilter("ignore")
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    engine = VLLMEngine(
        make_tokenizer(),
        sync_dir=folder,
        temperature=temperature,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=512,
        enforce_eager=True,
    )
    params, found = replace(PARAMS, temperature=temperature), {"mode": engine.mode, "differences": [], "modes": []}
    for step in (1, 2):
        model = llama(step)
        engine.sync(model, step)
        groups = engine.generate(PROMPTS, params, 3)
        assert [len(group) for group in groups] == [3] * len(PROMPTS)
        assert {rollout.version for group in groups for rollout in group} == {step}
        found["differences"].append(largest_difference(model, groups, temperature))
    assert engine.generate(PROMPTS, params, 3) == groups
    assert len({rollout.ids for rollout in groups[0]}) == 3
    for options in OPTIONS:
        each = replace(params, **options)
        if each.temperature == temperature:
            off = largest_difference(model, engine.generate(PROMPTS, each, 4), temperature)
            found["modes"].append([engine.exact_logprobs(each), off])
    greedy = replace(params, temperature=0.0, ignore_eos=True)
    whole = engine.generate(PROMPTS, greedy, 1)[0][0].ids
    token = next(token for token in whole[2:] if make_tokenizer().decode([token]))  # some of the vocabulary are no text
    for stop in ({"stop_token_ids": (token,)}, {"stop": (make_tokenizer().decode([token]),)}):
        (rollout,) = engine.generate(PROMPTS, replace(greedy, **stop), 1)[0]
        assert rollout.ids == whole[: whole.index(token) + 1]
        assert rollout.finish_reason == "stop"
    found["metrics"] = engine.take_metrics()
    (folder / f"found-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
