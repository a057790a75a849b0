"""The sampling loops, with continuous batching: rows enter and leave until every sample is finished.

    admit waiting samples while they fit into the token budget ─▶ one decode step for all rows ─▶ draw and append tokens
      ▲                                                                                             │
      └──────────────────────────── finished rows leave and free their tokens ◀─────────────────────┘

`SamplingLoop` reads every token on the host as it is drawn. `StaticSamplingLoop` draws on the device and reads the tokens
every few steps, so that the device does not wait for the host in between; tokens drawn after the end of a sample are
discarded. Both give the same samples, since a token depends only on its own sequence and its own random number.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trl.errors import ModelError
from trl.ops.capture import capture
from trl.rollouts.decoders import Decoder, Policy, Sample, decoder_start
from trl.rollouts.engine import FinishReason, Rollout
from trl.rollouts.paged_decoder import STREAM, TOKEN, WRITTEN, PagedDecoder, bucket
from trl.rollouts.sampler import Sampler, choose, guide
from trl.rollouts.sampling import SamplingParams, chosen_logprobs, stream
from trl.rollouts.stopping import Stopper

LOOK_EVERY = 8
"""Number of decode steps after which `StaticSamplingLoop` reads the drawn tokens."""

SHRINK = 4
"""The bucket shrinks once the rows need at most 1/SHRINK of it: a smaller step saves little, and may need a new CUDA graph."""


UNCAPTURED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which a step could not be captured, so that no other is tried."""


class SamplingLoop:
    """The loop of one call of `generate`. `rows` are the unfinished samples, in the order of the decoder's rows."""

    def __init__(
        self, policy: Policy, decoder: Decoder, sampler: Sampler | Steps, stopper: Stopper, budget: int, bar: tqdm
    ) -> None:
        self.policy, self.decoder, self.sampler, self.stopper = policy, decoder, sampler, stopper
        self.budget, self.bar = budget, bar
        self.rows: list[Sample] = []
        self.tokens = torch.empty(0, dtype=torch.long, device=policy.device)
        self.vocabulary = policy.inner.get_input_embeddings().weight.shape[0]

    def run(self, rows: list[Sample], prompts: int) -> list[list[Rollout]]:
        """The rollouts of each prompt, in the order of their sample numbers."""
        done: list[dict[int, Rollout]] = [{} for _ in range(prompts)]
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        while waiting or self.rows:
            self._admit(waiting)
            reasons = self._step()
            if any(reasons):
                for row, reason in zip(self.rows, reasons, strict=True):
                    if reason:
                        done[row.index][row.number] = Rollout(tuple(row.ids), tuple(row.logprobs), reason)
                self.bar.update(sum(reason is not None for reason in reasons))
                self._drop([reason is None for reason in reasons])
        return [[samples[i] for i in sorted(samples)] for samples in done]

    def _admit(self, waiting: deque[Sample]) -> None:
        """Admit waiting samples while they fit, once an eighth of the token budget is free, so that prefills are few."""
        if not waiting or (self.rows and self.decoder.reserved > self.budget * 7 / 8):
            return
        room, new = self.budget - self.decoder.reserved, []
        while waiting:
            room -= self.decoder.cost(waiting[0], after=new)
            if room < 0 and (new or self.rows):
                break
            new.append(waiting.popleft())
        if new:
            self._enter(new)

    def _enter(self, new: list[Sample]) -> None:
        self.decoder.admit(new)
        encoder = self.policy.inner.config.is_encoder_decoder
        contexts = [[decoder_start(self.policy.inner)] if encoder else row.prompt.ids for row in new]
        self.sampler.admit(new, contexts, self.vocabulary)
        self.rows += new
        self.tokens = torch.cat([self.tokens, self.tokens.new_tensor([context[-1] for context in contexts])])

    def _step(self) -> list[FinishReason | None]:
        """Draw the next tokens of every row. Returns the finish reason of each row, None for those that continue."""
        logits = self.decoder.step(self.tokens)
        self.tokens, logprobs = self.sampler.sample(logits)
        drawn = zip(self.rows, self.tokens.tolist(), logprobs.tolist(), strict=True)
        return [self._append(row, token, logprob) for row, token, logprob in drawn]

    def _append(self, row: Sample, token: int, logprob: float) -> FinishReason | None:
        if math.isnan(logprob):
            raise ModelError(
                f"The model's logits after prompts[{row.index}] and {len(row.ids)} sampled tokens are not finite. Either its "
                "weights contain NaN, or its activations overflow: look at the loss of the steps before, lower "
                "learning_rate, or use bfloat16 or float32."
            )
        row.ids.append(token)
        row.logprobs.append(logprob)
        return self.stopper.reason(row.ids, row.limit)

    def _drop(self, alive: list[bool]) -> None:
        kept = self.decoder.keep(alive)
        self.sampler.keep(kept)
        self.rows = [self.rows[row] for row in kept]
        self.tokens = self.tokens[torch.tensor(kept, dtype=torch.long, device=self.tokens.device)]


class StaticSamplingLoop(SamplingLoop):
    """A `SamplingLoop` whose steps run without the host; on CUDA they are captured, as one graph per bucket of rows."""

    decoder: PagedDecoder
    sampler: Steps
    size = 0

    def _enter(self, new: list[Sample]) -> None:
        index, number = (torch.tensor(x) for x in ([row.index for row in new], [row.number for row in new]))
        for row, key in zip(new, stream(self.sampler.params.seed, index, number).tolist(), strict=True):
            row.stream = key
        self.decoder.admit(new)
        self.rows += new

    def _step(self) -> list[FinishReason | None]:
        self._resize()
        steps = min(LOOK_EVERY, max(row.limit - len(row.ids) for row in self.rows))
        drawn = self.sampler.run(self.size, steps)
        return [
            self._append_all(row, tokens, logprobs)
            for row, tokens, logprobs in zip(self.rows, *drawn, strict=True)
        ]  # fmt: skip

    def _append_all(self, row: Sample, tokens: list[int], logprobs: list[float]) -> FinishReason | None:
        """Append tokens up to the sample's end; those drawn after it are discarded."""
        reasons = (self._append(row, *drawn) for drawn in zip(tokens, logprobs, strict=True))
        return next((reason for reason in reasons if reason), None)

    def _resize(self) -> None:
        """Choose the bucket: it grows when the rows need it, and shrinks when they need 1/SHRINK of it."""
        wanted = bucket(len(self.rows))
        if wanted > self.size or wanted * SHRINK <= self.size:
            self.size, self.decoder.is_stale = wanted, True
        if self.decoder.is_stale:
            self.decoder.refresh(self.size)
            self.sampler.refresh(self.size)

    def _drop(self, alive: list[bool]) -> None:
        self.rows = [self.rows[row] for row in self.decoder.keep(alive)]


class Steps:
    """Runs decode steps on the first rows of the decoder's table; each step also draws tokens and stores them on the device.

    The first step of a bucket runs eagerly, which compiles its kernels; the second is captured as a CUDA graph. Captured or
    not, a step runs the same code on the same memory.
    """

    def __init__(
        self, policy: Policy, decoder: PagedDecoder, params: SamplingParams, stops: list[int], *, captures: bool
    ) -> None:
        self.policy, self.decoder, self.params = policy, decoder, params
        self.captures = captures and policy.model not in UNCAPTURED
        device, rows = policy.device, decoder.table.shape[1]
        self.stops = torch.tensor(stops, device=device, dtype=torch.long)
        self.ids = torch.zeros(LOOK_EVERY, rows, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(LOOK_EVERY, rows, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = None if params.logit_mask is None else params.logit_mask.to(device)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1:
            vocabulary = policy.inner.get_input_embeddings().weight.shape[0]
            self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self.known: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def refresh(self, rows: int) -> None:
        """Rebuild, for the repetition penalty, the table of tokens that occur in the current rows."""
        if self.seen is not None:
            tokens = [[*row.prompt.ids, *row.ids] for row in self.decoder.rows]
            place = [(number, token) for number, ids in enumerate(tokens) for token in ids]
            self.seen[:rows] = False
            self.seen[tuple(torch.tensor(place, device=self.seen.device).T)] = True

    def run(self, rows: int, steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """Run `steps` steps, and return the tokens and log-probabilities by row. Waits for the device once, at the end."""
        span, count = self.decoder.advance(steps), len(self.decoder.rows)
        self.cursor.zero_()
        for _ in range(steps):
            self._one(rows, span)
        return self.ids[:steps, :count].T.tolist(), self.logprobs[:steps, :count].T.tolist()

    def _one(self, rows: int, span: int) -> None:
        if self.captures and rows in self.known and rows not in self.graphs:
            self._capture(rows)
        if rows in self.graphs:
            self.graphs[rows].replay()
        else:
            self._step(rows, span)
            self.known.add(rows)

    def _step(self, rows: int, span: int) -> None:
        """Draw one token for every row, and write it into the decoder's table and into line `cursor` of `ids`."""
        table = self.decoder.table[:, :rows]
        logits, guided = guide(self.decoder.logits(rows, span), table[TOKEN], self.params, self.mask)
        state = table[STREAM], table[WRITTEN], None if self.seen is None else self.seen[:rows]
        tokens = choose(guided, *state, self.params, self.stops, may_sync=False)
        logprobs = chosen_logprobs(logits, tokens, self.params.temperature)
        self.ids[:, :rows].index_copy_(0, self.cursor, tokens[None])
        self.logprobs[:, :rows].index_copy_(0, self.cursor, logprobs[None])
        table[TOKEN] = tokens
        table[WRITTEN] += 1
        self.cursor += 1

    def _capture(self, rows: int) -> None:
        try:  # for as many keys as the rows may come to have, since the graph is replayed until then
            self.graphs[rows], self.pool = capture(lambda: self._step(rows, self.decoder.capacity), self.pool)
        except RuntimeError as error:  # as where the model's forward synchronises with the device
            self.captures = False
            if not isinstance(error, torch.OutOfMemoryError):  # there may be more memory for the next rollout batch
                UNCAPTURED.add(self.policy.model)
            warnings.warn(
                f"A step of {type(self.policy.inner).__name__} cannot be captured as a CUDA graph, so its kernels are "
                f"launched one by one: {error}",
                stacklevel=2,
            )
