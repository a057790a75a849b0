"""Shortest paths from random walks: the example's task, and that GRPO, RLOO and PPO learn it."""

from __future__ import annotations

import copy
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "randomwalks"))

import walks

from tests.serve.support import serve
from trl.rollouts.server import ServerEngine


def the_run():
    """`run.py` of this example; others have a file of that name."""
    spec = importlib.util.spec_from_file_location("randomwalks_run", Path(walks.__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = the_run()


def test_the_graph_and_its_shortest_walks():
    graph = walks.GRAPH
    assert graph.shape == (21, 21)
    assert not graph.diagonal().any()
    assert not graph[walks.GOAL].any()
    assert graph[1:].any(axis=1).all()
    reached, lengths = {walks.GOAL}, {walks.GOAL: 1}
    while len(reached) < 21:
        frontier = {node for node in set(range(21)) - reached if any(graph[node, to] for to in reached)}
        lengths |= dict.fromkeys(frontier, max(lengths.values()) + 1)
        reached |= frontier
    assert walks.SHORTEST.tolist() == [lengths[node] for node in range(21)]


def test_optimality():
    """Node 3 has an edge to the goal; 1 reaches it in three nodes at best."""
    assert walks.optimality([3, 0]) == 1.0
    assert walks.optimality([3, 0, 7, 7]) == 1.0
    middle = next(node for node in np.flatnonzero(walks.GRAPH[1]) if walks.GRAPH[node, 0])
    assert walks.optimality([1, int(middle), 0]) == 1.0
    assert not walks.GRAPH[1, 0]
    assert walks.optimality([1, 0]) == 0.0
    assert walks.optimality([3, 21, 0]) == 0.0
    assert walks.optimality([3]) == 0.0


def test_random_walks_are_legal_and_some_arrive():
    found = walks.random_walks()
    assert len(found) == 1000
    assert max(map(len, found)) == 10
    assert all(walks.GRAPH[at, to] for walk in found for at, to in pairwise(walk))
    assert 0.3 < np.mean([walks.optimality(walk) for walk in found]) < 0.4


@pytest.fixture(scope="module")
def pretrained():
    return run.pretrain()


def method_of(name):
    """One method always; the others take as long each."""
    return pytest.param(name, marks=pytest.mark.slow if name == "grpo" else pytest.mark.long)


@pytest.mark.parametrize("method", [*map(method_of, run.METHODS)])
def test_walks_become_the_shortest(pretrained, method):
    model = copy.deepcopy(pretrained)
    before = walks.mean_optimality(model)
    assert before < 0.45
    run.learn(model, method)
    assert walks.mean_optimality(model) >= 0.95


@pytest.mark.long
def test_walks_become_the_shortest_through_a_server(pretrained, tmp_path):
    model = copy.deepcopy(pretrained)
    with serve(walks.make_model(), walks.make_tokenizer()) as served:
        engine = ServerEngine(served.url, walks.make_tokenizer(), sync_dir=tmp_path)
        run.learn(model, "grpo", engine=engine)
        engine.close()
    assert walks.mean_optimality(model) >= 0.95
