"""A decoder over the paged KV cache, with static shapes: a decode step can be replayed as a CUDA graph.

The number of rows is padded to a bucket, and the shapes and addresses of a step depend on the bucket alone. All that a
step reads of its rows is in tables on the device. The host rewrites them when rows enter or leave; a step updates the
tokens and counts in them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl.models.patching import configs_of
from trl.rollouts.decode_attention import TILE, Tables
from trl.rollouts.decoders import Policy, Sample, batches_by_length, fill_holes, pad
from trl.rollouts.engine import Prompt
from trl.rollouts.paged_cache import PagedCache, Pages

if TYPE_CHECKING:
    from trl.rollouts.fusions import Fusions

TOKEN, PREFIX, WRITTEN, LAST, STREAM = range(5)
"""Rows of the table `[5,R]` int64: the token to feed, prompt tokens in the cache, own tokens in the cache before this step,
the largest value of that count, and the key of the row's random numbers."""


def bucket(rows: int) -> int:
    """Rows of a decode step after padding: `rows` rounded up to a power of two, at least 8."""
    return max(8, 1 << (rows - 1).bit_length())


def pages_for(tokens: int, page: int) -> int:
    return -(-tokens // page)


@dataclass(slots=True)
class HeldPrompt:
    """A prompt whose keys are in the cache: its pages, and how many of its samples are unfinished."""

    prompt: Prompt
    pages: list[int]
    unfinished: int


class PagedDecoder:
    """A decoder whose rows read pages. Prefill stops before the last token of a prompt, which a decode step is fed first.

    `expected` are all samples that will be admitted, and `budget` is the most tokens to hold at a time. The pool has as
    many pages as the smaller of the two needs, but at least enough for one sample and its prompt.
    """

    def __init__(
        self,
        policy: Policy,
        windows: Sequence[int | None],
        n: int,
        expected: Sequence[Sample],
        *,
        budget: int,
        page: int,
        kernels: bool = False,
    ) -> None:
        self.policy, self.n, self.page = policy, n, page
        prompts = {row.index: pages_for(len(row.prompt) - 1, page) for row in expected}
        own = [pages_for(row.limit, page) for row in expected]
        self.prompt_pages = max(prompts.values())
        most = min(budget // page, sum(prompts.values()) + sum(own))
        self.pages = Pages(max(most, self.prompt_pages + max(own)))
        rows = max(1, min(len(expected), self.pages.count // min(own)))
        self.cache = PagedCache(windows, self.pages.count, page=page, kernels=kernels)
        self.configs = configs_of(policy.inner)
        self.fusions: Fusions | None = None
        if kernels:  # Triton is not installed everywhere
            from trl.rollouts.fusions import Fusions

            self.fusions = Fusions(policy.inner, policy.device)
        self.rows: list[Sample] = []
        self.own: list[list[int]] = []
        self.prompts: dict[int, HeldPrompt] = {}
        size, device = bucket(rows), policy.device
        self.table = torch.zeros(5, size, dtype=torch.long, device=device)
        self.page_table = torch.full((size, self.prompt_pages + max(own)), self.pages.count, device=device)
        self.tiles = torch.full((size, TILE), -1, device=device)
        self.span = 0
        self.is_stale = True

    # ---- rows ----

    @property
    def reserved(self) -> int:
        held = sum(len(held.pages) for held in self.prompts.values()) + sum(map(len, self.own))
        return held * self.page

    @property
    def capacity(self) -> int:
        """Most keys that a row can have."""
        return self.page_table.shape[1] * self.page

    def cost(self, sample: Sample, *, after: Sequence[Sample] = ()) -> int:
        held = sample.index in self.prompts or sample.index in {other.index for other in after}
        pages = pages_for(sample.limit, self.page) + (0 if held else pages_for(len(sample.prompt) - 1, self.page))
        return pages * self.page

    def admit(self, samples: Sequence[Sample]) -> None:
        new = {s.index: s.prompt for s in samples if s.index not in self.prompts}
        for index, prompt in new.items():
            pages = self.pages.take(pages_for(len(prompt) - 1, self.page))
            self.prompts[index] = HeldPrompt(prompt, pages, self.n)
        for batch in batches_by_length({index: len(prompt) - 1 for index, prompt in new.items()}):
            self._prefill(batch)
        self.own += [self.pages.take(pages_for(s.limit, self.page)) for s in samples]
        self.rows += samples
        self.is_stale = True

    def _prefill(self, batch: list[int]) -> None:
        prefixes = [self.prompts[index].prompt.ids[:-1] for index in batch]
        if not prefixes[0]:
            return
        ids, _ = pad(prefixes, self.policy.device)
        nowhere, longest = self.pages.count * self.page, ids.shape[1]
        places = []
        for index, prefix in zip(batch, prefixes, strict=True):
            pages = self.prompts[index].pages
            at = [pages[t // self.page] * self.page + t % self.page for t in range(len(prefix))]
            places += at + [nowhere] * (longest - len(at))
        self.cache.prefill(torch.tensor(places, device=ids.device))
        positions = torch.arange(longest, device=ids.device).expand_as(ids)
        self.policy.forward(input_ids=ids, position_ids=positions, cache=self.cache)

    def keep(self, alive: Sequence[bool]) -> list[int]:
        for row, pages, lives in zip(self.rows, self.own, alive, strict=True):
            if not lives:
                self.pages.give_back(pages)
                self.prompts[row.index].unfinished -= 1
        kept = fill_holes(alive)
        self.rows, self.own = ([held[i] for i in kept] for held in (self.rows, self.own))
        for index in [index for index, held in self.prompts.items() if not held.unfinished]:
            self.pages.give_back(self.prompts.pop(index).pages)
        self.is_stale = True
        return kept

    # ---- a step ----

    def step(self, tokens: Tensor) -> Tensor:
        """`Decoder.step`: writes the tokens into the table and advances the rows' counts by one."""
        size = bucket(len(self.rows))
        self.refresh(size)
        self.table[TOKEN, : len(tokens)] = tokens
        logits = self.logits(size, self.advance(1))
        self.table[WRITTEN] += 1
        return logits[: len(tokens)]

    def advance(self, steps: int) -> int:
        """Count `steps` decode steps that are about to run, and return how many keys the longest row has after them."""
        self.span += steps
        return self.span

    def logits(self, rows: int, span: int) -> Tensor:
        """Logits `[rows,V]` float32 of one decode step for the first `rows` of the table, without a device synchronisation."""
        table = self.table[:, :rows]
        own = torch.minimum(table[WRITTEN], table[LAST])
        pages, tiles = self.page_table[:rows], self.tiles[:rows]
        self.cache.decode(Tables(pages, table[PREFIX], own, tiles, self.prompt_pages, span))
        fused = nullcontext() if self.fusions is None else self.fusions.active()
        with self.cache.decoding(self.configs), fused:
            return self.policy.forward(
                input_ids=table[TOKEN, :, None],
                position_ids=(table[PREFIX] + own)[:, None],
                cache=self.cache,
            )

    def refresh(self, rows: int) -> None:
        """Rewrite the tables, padded to `rows`, if rows have entered or left since they were written."""
        if not self.is_stale:
            return
        fill = rows - len(self.rows)
        columns = [
            [row.ids[-1] if row.ids else row.prompt.ids[-1] for row in self.rows],
            [len(row.prompt) - 1 for row in self.rows],
            [len(row.ids) for row in self.rows],
            [row.limit - 1 for row in self.rows],
            [row.stream for row in self.rows],
        ]
        self.table[:, :rows] = torch.tensor([column + [0] * fill for column in columns])
        self.page_table[:rows] = torch.tensor([*map(self._page_row, self.rows, self.own), *[self._page_row()] * fill])
        self.tiles[:rows] = torch.tensor(self._tiles(rows))
        self.span = max(len(row.prompt) - 1 + len(row.ids) for row in self.rows)
        self.is_stale = False

    def _page_row(self, row: Sample | None = None, own: Sequence[int] = ()) -> list[int]:
        """A row of the page table; unused columns hold the number of the page that belongs to nobody."""
        nobody = self.pages.count
        prompt = self.prompts[row.index].pages if row is not None else []
        own_columns = self.page_table.shape[1] - self.prompt_pages
        return [
            *prompt, *[nobody] * (self.prompt_pages - len(prompt)), *own, *[nobody] * (own_columns - len(own))
        ]  # fmt: skip

    def _tiles(self, rows: int) -> list[list[int]]:
        """Tiles `[rows,TILE]`: each lists rows of one prompt that has keys in the cache, padded with −1."""
        members: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            if len(row.prompt) > 1:
                members.setdefault(row.index, []).append(number)
        tiles = [held[i : i + TILE] for held in members.values() for i in range(0, len(held), TILE)]
        return [*(tile + [-1] * (TILE - len(tile)) for tile in tiles), *[[-1] * TILE] * (rows - len(tiles))]
