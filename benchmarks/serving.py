"""What servers cost: HTTP against the same sampler in process, sending weights, and what a second server saves.

    python benchmarks/serving.py [--rounds 5] [--threads 1] [--only http,sync,servers]

http      a round of 64 prompts of 32 tokens, each continued by 64, of a Llama of 15 M parameters: by `LocalEngine` in this
          process, and by `trl serve`, which runs the same engine in its own. Same seeds, same tokens; rounds alternate.
          Processor time is that of this process and the server together: other programs disturb it least.
sync      seconds until the server has the weights of that model, and has been compared with the trainer
servers   the round by one server and by two, processes of their own, which sleep for 20 ms at each prompt, one after the other
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import synthetic
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.server import ServerEngine

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
PER_PROMPT = 0.02
"""Seconds for which the servers of the last part sleep."""

PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1_000, synthetic.VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator)
    return [Prompt(row) for row in ids.tolist()]


@contextmanager
def trl_serve(folder: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """`trl serve` of the model in `folder`: its URL and process."""
    command = [sys.executable, "-m", "trl", "serve", str(folder), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            yield program.stdout.readline().split()[-1], psutil.Process(program.pid)
        finally:
            program.terminate()


def timed(act: Callable[[], Any], server: psutil.Process) -> tuple[Any, dict[str, float]]:
    """What `act` gives, and its seconds by clock."""

    def now() -> dict[str, float]:
        used = server.cpu_times()
        return {"wall": time.perf_counter(), "processor": time.process_time() + used.user + used.system}

    before = now()
    result = act()
    return result, {clock: value - before[clock] for clock, value in now().items()}


def compare_http(folder: Path, rounds: int, threads: int) -> None:
    model = synthetic.model(seed=0).eval()
    local, given = LocalEngine(model, synthetic.tokenizer(), progress=False), prompts()
    with trl_serve(folder, threads) as (url, process):
        server = ServerEngine(url, synthetic.tokenizer())
        server.sync(model, 0)
        found: list[dict[str, dict[str, float]]] = []
        for number in range(rounds + 1):
            params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, seed=number)
            sides = [("in process", local), ("server", server)]
            found.append({})
            tokens = []
            for side, engine in sides if number % 2 else sides[::-1]:
                rollouts, found[-1][side] = timed(partial(engine.generate, given, params, 1), process)
                tokens.append([rollout.ids for (rollout,) in rollouts])
            assert tokens[0] == tokens[1]
        server.close()
    for clock in ("wall", "processor"):
        own, other = (statistics.median(each[side][clock] for each in found[1:]) for side in ("in process", "server"))
        print(f"http: in process {own:.3f} s, server {other:.3f} s of {clock} time: {other / own:.3f}", flush=True)


def time_sync(folder: Path, rounds: int, threads: int) -> None:
    model = synthetic.model(seed=0).eval()
    with trl_serve(folder, threads) as (url, process):
        engine = ServerEngine(url, synthetic.tokenizer())
        engine.sync(model, 0)
        found = [timed(partial(engine.sync, model, step), process)[1] for step in range(1, rounds + 1)]
        engine.close()
    middle = {clock: statistics.median(each[clock] for each in found) for clock in found[0]}
    print(f"sync: {middle['wall']:.3f} s, {middle['processor']:.3f} s of processor time", flush=True)


def sleeper() -> Starlette:
    """vLLM's routes; prompts are answered one after the other, each after a sleep."""
    turn = asyncio.Lock()

    async def completions(request: Request) -> JSONResponse:
        body = await request.json()
        async with turn:
            await asyncio.sleep(PER_PROMPT * len(body["prompt"]))
        tokens = [5] * body["max_tokens"]
        choice = {"token_ids": tokens, "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0] * len(tokens)}}
        return JSONResponse({"choices": [{"index": i, **choice} for i in range(body["n"] * len(body["prompt"]))]})

    async def info(_: Request) -> JSONResponse:
        # log-probabilities of this mode are not compared with the trainer's
        about = {"dtype": "float32", "logprobs_mode": "raw_logits", "hf_config": {"vocab_size": synthetic.VOCABULARY}}
        return JSONResponse({"vllm_config": {"model_config": about}})

    async def fine(_: Request) -> JSONResponse:
        return JSONResponse({"success": True, "data": [{"id": "sleeper"}]})

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/server_info", info),
            Route("/{path:path}", fine, methods=["GET", "POST"]),
        ]
    )


def serve_sleeper(told: Connection) -> None:
    """Serve a sleeper in this process, and tell its URL."""
    config = uvicorn.Config(sleeper(), port=0, log_level="critical")
    server, socket = uvicorn.Server(config), config.bind_socket()
    told.send(f"http://127.0.0.1:{socket.getsockname()[1]}")
    server.run([socket])


@contextmanager
def sleeping() -> Iterator[str]:
    """The URL of a sleeper in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    here, there = fresh.Pipe()
    process = fresh.Process(target=serve_sleeper, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def compare_servers(rounds: int) -> None:
    model, given, found = synthetic.model(seed=0), prompts(), {}
    for count in (1, 2):
        with ExitStack() as stack:
            engine = ServerEngine([stack.enter_context(sleeping()) for _ in range(count)])
            engine.sync(model, 0)
            taken = []
            for _ in range(rounds):
                start = time.perf_counter()
                engine.generate(given, PARAMS, 1)
                taken.append(time.perf_counter() - start)
            engine.close()
        found[count] = statistics.median(taken)
    print(f"servers: one {found[1]:.3f} s, two {found[2]:.3f} s of wall time: {found[2] / found[1]:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="http,sync,servers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        synthetic.model(seed=1).save_pretrained(folder)
        synthetic.tokenizer().save_pretrained(folder)
        parts = {
            "http": lambda: compare_http(folder, args.rounds, args.threads),
            "sync": lambda: time_sync(folder, args.rounds, args.threads),
            "servers": lambda: compare_servers(args.rounds),
        }
        for part in args.only.split(","):
            parts[part]()


if __name__ == "__main__":
    main()
