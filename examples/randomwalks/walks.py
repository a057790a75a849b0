"""Shortest paths on a graph: a reinforcement-learning task that a CPU solves in a minute.

    optimality(walk) = (10 − length) / (10 − shortest length from its start),   0 if it is illegal or misses the goal

A directed graph of 21 nodes; node 0 is the goal, where walks end. A node is a letter and a token; a walk is a word, such as
"kfa". The goal's token ends the sequence. Lengths count nodes, both ends included. The task was posed for decision
transformers (arXiv:2106.01345).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams

NODES = "abcdefghijklmnopqrstu"
GOAL = 0
STARTS = range(1, len(NODES))
LONGEST = 10
"""Maximum number of nodes of a walk."""


def make_graph(seed: int = 1000) -> np.ndarray:
    """Adjacency, (21, 21) bool: each edge present with probability 0.1, redrawn until every node has an outgoing edge."""
    numbers = np.random.RandomState(seed)
    while True:
        edges = numbers.random_sample((len(NODES), len(NODES))) > 0.9
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[GOAL] = False
    return edges


GRAPH = make_graph()


def random_walks(count: int = 1000, *, seed: int = 1000) -> list[list[int]]:
    """Walks from random starts along random edges, up to the goal or the tenth node."""
    numbers = np.random.RandomState(seed)
    walks = []
    for _ in range(count):
        walk = [int(numbers.choice(STARTS))]
        while walk[-1] != GOAL and len(walk) < LONGEST:
            walk.append(int(numbers.choice(np.flatnonzero(GRAPH[walk[-1]]))))
        walks.append(walk)
    return walks


def shortest_lengths() -> np.ndarray:
    """(21,) nodes on the shortest walk from each node to the goal; at most 10."""
    lengths = np.full(len(NODES), LONGEST)
    lengths[GOAL] = 1
    for _ in range(LONGEST):
        through = np.where(GRAPH, lengths[None, :] + 1, LONGEST).min(axis=1)
        lengths = np.minimum(lengths, through)
    return lengths


SHORTEST = shortest_lengths()


def optimality(walk: Sequence[int]) -> float:
    """Optimality of a walk, 0 to 1: 1 for a shortest one. Nodes after the goal are ignored."""
    if GOAL not in walk:
        return 0.0
    length = walk.index(GOAL) + 1
    legal = all(to < len(NODES) and GRAPH[at, to] for at, to in pairwise(walk[:length]))
    return (LONGEST - length) / (LONGEST - SHORTEST[walk[0]]) if legal and length < LONGEST else 0.0


def near_shortest(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    """The reward function: the optimality of each walk that begins with the prompt."""
    pairs = zip(prompts, completion_ids, strict=True)
    return [optimality([NODES.index(prompt), *ids]) for prompt, ids in pairs]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per node, whose id is the number of the node; the goal is EOS."""
    vocabulary = {letter: node for node, letter in enumerate([*NODES, "?", "_"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=NODES[GOAL], unk_token="?", pad_token="_", model_max_length=LONGEST
    )


def make_model() -> GPT2LMHeadModel:
    """GPT-2 of 6 layers × 144, without dropout."""
    sizes = {"vocab_size": len(NODES) + 2, "n_positions": 16, "n_embd": 144, "n_layer": 6, "n_head": 6}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": GOAL, "eos_token_id": GOAL, "pad_token_id": len(NODES) + 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **special))


def walk_rows() -> Dataset:
    """The random walks, to pre-train on."""
    return Dataset.from_dict({"input_ids": random_walks()})


def start_rows(copies: int = 1) -> Dataset:
    """The 20 starts as prompts."""
    return Dataset.from_dict({"prompt": [NODES[node] for node in STARTS] * copies})


def mean_optimality(model: torch.nn.Module, *, samples: int = 50, seed: int = 0) -> float:
    """Mean optimality of `samples` sampled walks from each start."""
    engine = LocalEngine(model, progress=False)
    params = SamplingParams(max_new_tokens=LONGEST - 1, seed=seed)
    sampled = engine.generate([Prompt((node,)) for node in STARTS], params, n=samples)
    pairs = zip(STARTS, sampled, strict=True)
    return float(np.mean([optimality([node, *rollout.ids]) for node, rollouts in pairs for rollout in rollouts]))
