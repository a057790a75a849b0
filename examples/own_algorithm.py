"""Your own algorithm in the online loop: implement two methods, `advantages` and `loss`; the trainer does the rest.

RAFT (Dong et al. 2023, arXiv:2304.06767): fine-tune on the best sample of each prompt.

    python examples/own_algorithm.py MODEL
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset

from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig
from trl.types import Algorithm


class RAFT(Algorithm):
    def advantages(self, experience):
        best = torch.zeros_like(experience.rewards)
        for group in experience.group.unique():
            members = (experience.group == group).nonzero().flatten()
            best[members[experience.rewards[members].argmax()]] = 1
        return experience.with_signals(best=best)

    def loss(self, scores, batch):
        return -scores.logprobs * batch.signals["best"][:, None], {"entropy": scores.entropy}


def short(completion_ids, **_):
    return [-len(ids) / 100 for ids in completion_ids]


if __name__ == "__main__":
    prompts = Dataset.from_dict({"prompt": ["The weather today is", "My favourite book is", "In the morning I"] * 16})
    args = OnlineConfig("own-algorithm", max_completion_length=64, learning_rate=1e-5, logging_steps=1)
    OnlineTrainer(sys.argv[1], short, args, prompts, algorithm=RAFT()).train()
