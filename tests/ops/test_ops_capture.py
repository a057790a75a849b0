"""What a capture does around PyTorch's, and leaves behind if it fails. Streams, graphs and the allocator are stood in for."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.torch_version import TorchVersion

from trl.ops import capture as file
from trl.ops.capture import capture


class Graph:
    """A graph, and whether its capture has succeeded."""

    is_captured = False

    def pool(self):
        if not self.is_captured:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")


class Card:
    """A device whose captures end as those of a release of PyTorch do. Graphs that are captured give back their pools, and
    since 2.14 those that are not."""

    def __init__(self, release: str):
        self.release_of_torch, self.stream, self.is_invalid = TorchVersion(release), "training", False
        self.pools, self.captures, self.workspaces = Counter(), [], {"training"}
        self.draws, self.seen = True, []

    @contextmanager
    def graph(self, graph, pool="own", *, stream, capture_error_mode="global"):
        assert not self.captures, "empty_cache while a capture is underway"
        self.captures.append(pool)
        self.pools[pool] += 1
        self.stream, self.draws, self.is_invalid = stream, False, False
        self.seen.append((pool, stream, capture_error_mode, set(self.workspaces)))
        self.workspaces.add(stream)
        try:
            yield
        finally:
            self.finish(graph, pool)

    def finish(self, graph, pool):
        if not self.is_invalid or self.release_of_torch >= "2.13":
            self.end(1, pool)
            self.draws = True
        if self.is_invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        graph.is_captured, self.stream = True, "training"

    def end(self, device, pool):
        if pool not in self.captures:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures.remove(pool)

    def release(self, device, pool):
        self.pools[pool] -= 1

    def invalidate(self):
        self.is_invalid = True


@pytest.fixture(params=["2.12.1", "2.13.0", "2.14.1"])
def card(request, monkeypatch):
    made, handles = Card(request.param), iter(("first", "second", "third"))
    monkeypatch.setattr(torch, "__version__", made.release_of_torch)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    for name, new in {
        "CUDAGraph": Graph,
        "Stream": lambda device: f"captures on {device}",
        "current_device": lambda: 1,
        "current_stream": lambda: made.stream,
        "set_stream": lambda stream: setattr(made, "stream", stream),
        "graph_pool_handle": lambda: next(handles),
        "graph": made.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, new)
    for name, new in {"endAllocateToPool": made.end, "releasePool": made.release}.items():
        monkeypatch.setattr(torch._C, f"_cuda_{name}", new, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", made.workspaces.clear, raising=False)
    file._stream.cache_clear()
    yield made
    file._stream.cache_clear()


def test_graphs_share_a_pool_and_a_stream_of_their_device_and_keep_no_workspace(card):
    _, pool = capture(lambda: None)
    _, same = capture(lambda: None, pool)
    assert pool == same == "first"
    assert card.seen == [("first", "captures on 1", "thread_local", set())] * 2
    assert card.workspaces == set()
    assert card.stream == "training"


def test_a_capture_that_is_invalidated_is_over(card):
    with pytest.raises(RuntimeError, match="during capture"):
        capture(card.invalidate)
    assert (card.captures, card.stream, card.draws, card.workspaces) == ([], "training", True, set())
    assert card.pools["first"] == (card.release_of_torch >= "2.14")
    assert capture(lambda: None)[1] == "second"


def test_an_error_within_a_capture_is_raised(card):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(fail)
    assert (card.captures, card.stream, card.pools["first"]) == ([], "training", 1)
