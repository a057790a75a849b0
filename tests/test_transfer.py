"""The tensors of a batch as one buffer."""

from __future__ import annotations

import torch

from trl.transfer import ALIGNMENT, packed, sent, unpacked

TENSORS = [
    torch.tensor([True, False, True]),
    torch.arange(7),
    torch.tensor(2.5),
    torch.empty(0, 4),
    torch.randn(3, 5).T,
    torch.ones(1, 3, dtype=torch.bfloat16).expand(4, 3),
    torch.arange(5, dtype=torch.int32),
]


def test_what_was_packed_is_found_again():
    buffer, starts = packed(TENSORS)
    assert all(start % ALIGNMENT == 0 for start in starts)
    for found, given in zip(unpacked(buffer, starts, TENSORS), TENSORS, strict=True):
        assert found.dtype == given.dtype
        assert torch.equal(found, given)


def test_tensors_of_the_host_travel_together():
    there = torch.empty(2, device="meta")
    found = sent([TENSORS[0], there, TENSORS[1]], torch.device("meta"))
    assert [x.device.type for x in found] == ["meta"] * 3
    assert found[0].untyped_storage()._cdata == found[2].untyped_storage()._cdata
    assert found[1] is there


def test_tensors_stay_where_they_are():
    assert all(a is b for a, b in zip(sent(TENSORS, torch.device("cpu")), TENSORS, strict=True))
