"""Shortest walks on a graph, as texts: the task of the scripts in this folder.

    optimality(walk) = (10 − length) / (10 − length of the shortest from its start),   0 if it is illegal or misses the goal

A graph has 21 nodes, each a letter; the first is the goal. A walk is a word, from another node along edges to the goal, of 10
letters at most. The task was posed for decision transformers (arXiv:2106.01345).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END, PAD = "|", "_"


def generate_random_walks(
    n_nodes: int = 21, max_length: int = 10, n_walks: int = 1000, p_edge: float = 0.1, seed: int = 1000
) -> tuple[Callable, list[str], list[str], np.ndarray]:
    """Return `metric_fn` for the optimality of samples, prompts (all starts), random walks, and the mask of missing edges."""
    numbers = np.random.RandomState(seed)
    while True:
        edges = numbers.random_sample((n_nodes, n_nodes)) > 1 - p_edge
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[0] = False
    edges[0, 0] = True
    shortest = _lengths(edges, max_length)

    def optimality(sample: str) -> float:
        walk = [LETTERS.find(letter) for letter in sample.split(END)[0]]
        walk = walk[: walk.index(0) + 1] if 0 in walk else walk
        legal = all(0 <= b < n_nodes and edges[a, b] for a, b in pairwise(walk)) and 0 <= walk[0] < n_nodes
        if not legal or walk[-1] != 0 or len(walk) >= max_length:
            return 0.0
        return (max_length - len(walk)) / (max_length - shortest[walk[0]])

    def metric_fn(samples: list[str], **_: object) -> dict[str, list[float]]:
        return {"optimality": [optimality(sample) for sample in samples]}

    walks = []
    for _ in range(n_walks):
        walk = [int(numbers.randint(1, n_nodes))]
        while walk[-1] != 0 and len(walk) < max_length:
            walk.append(int(numbers.choice(np.flatnonzero(edges[walk[-1]]))))
        walks.append("".join(LETTERS[node] for node in walk))
    return metric_fn, list(LETTERS[1:n_nodes]), walks, ~edges


def _lengths(edges: np.ndarray, limit: int) -> list[int]:
    """Number of nodes on the shortest walk from each node to node 0; at most `limit`."""
    lengths = {0: 1}
    waiting = deque([0])
    while waiting:
        to = waiting.popleft()
        for node in np.flatnonzero(edges[:, to]):
            if int(node) not in lengths:
                lengths[int(node)] = lengths[to] + 1
                waiting.append(int(node))
    return [min(lengths.get(node, limit), limit) for node in range(len(edges))]


def make_tokenizer(folder: str | Path, n_nodes: int = 21) -> str:
    """Save a tokenizer of letters to `folder`; return the folder."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS[:n_nodes], END, PAD])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=PAD)
    tokenizer.save_pretrained(folder)
    return str(folder)


def model_config(n_nodes: int = 21) -> GPT2Config:
    """A GPT-2 of 6 layers × 144, with random weights."""
    end = n_nodes
    return GPT2Config(
        n_layer=6,
        n_embd=144,
        n_head=6,
        n_positions=32,
        vocab_size=n_nodes + 2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=n_nodes + 1,
    )
