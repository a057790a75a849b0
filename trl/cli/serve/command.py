"""`trl serve MODEL`: a model behind the routes of OpenAI and of vLLM.

trl serve Qwen/Qwen2.5-0.5B-Instruct
trl serve ./my-model --port 8001 --dtype bfloat16
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trl.cli.commands import MODEL
from trl.cli.fields import Option, aliases_in_source, merge_options, options_in_source
from trl.cli.parser import OptionParser
from trl.cli.serve.arguments import KEY, ServeArguments
from trl.errors import ConfigError
from trl.imports import require

if TYPE_CHECKING:
    from trl.cli.serve.worker import ModelWorker

SERVE = "trl.cli.serve.arguments:ServeArguments"
TRAINED = ("use_peft", "lora_", "use_rslora", "use_dora")
"""Beginnings of the model's options that only training reads."""

DEFAULTS = {"dtype": "auto"}
SUMMARY = "Serve a model to trainers, to `trl chat --server`, and to any client of OpenAI's protocol."
WORDS = ("Qwen/Qwen2.5-0.5B-Instruct", "./my-model --port 8001 --served_model_name mine")


def options() -> list[Option]:
    found = merge_options(options_in_source(SERVE), options_in_source(MODEL))
    kept = [option for option in found if not option.name.startswith(TRAINED)]
    return [replace(option, default=DEFAULTS.get(option.name, option.default)) for option in kept]


def run(words: Sequence[str]) -> int:
    named = bool(words) and not words[0].startswith("-")
    if named:
        words = ["--model_name_or_path", *words]
    given = OptionParser(options(), aliases_in_source(MODEL)).parse(words)
    if given.help:
        from trl.cli.help import print_options

        examples = [f"trl serve {each}" for each in WORDS]
        print_options("trl serve MODEL", SUMMARY, options(), everything=given.help == "all", examples=examples)
        return 0
    os.environ.update(given.environment)
    arguments: ServeArguments = given.arguments_for(ServeArguments)
    arguments.api_key = arguments.api_key or os.environ.get(KEY)
    require("starlette", to="trl serve")
    require("uvicorn", to="trl serve")
    name = given.values.get("model_name_or_path")
    if name is None:
        raise ConfigError("trl serve takes a model: trl serve MODEL [--port 8000].")
    from trl.cli.train import check_weights
    from trl.models.config import ModelConfig

    check_weights(name)
    model = replace(given, values={**DEFAULTS, **given.values}).arguments_for(ModelConfig)
    serve(load_worker(arguments, model), arguments.served_model_name or name, arguments)
    return 0


def load_worker(arguments: ServeArguments, model: object) -> ModelWorker:
    """The model that the options name, ready to be asked."""
    from peft import PeftModel

    from trl.cli.chat.arguments import ChatArguments
    from trl.cli.chat.local import load_speaker
    from trl.cli.serve.worker import ModelWorker

    chat = ChatArguments(device=arguments.device, chat_template_kwargs=arguments.chat_template_kwargs)
    speaker = load_speaker(chat, model)
    # An adapter that the name stands for is part of the weights; others come and go by their names.
    whole = speaker.model.merge_and_unload() if isinstance(speaker.model, PeftModel) else speaker.model
    return ModelWorker(
        whole,
        speaker.processor,
        max_tokens_alive=arguments.max_tokens_alive,
        max_waiting=arguments.max_waiting,
        template_kwargs=arguments.chat_template_kwargs,
    )


def serve(worker: ModelWorker, name: str, arguments: ServeArguments) -> None:
    """Serve until the process is told to end."""
    import uvicorn

    from trl.cli.serve.app import make_app

    if not arguments.is_private and arguments.api_key is None:
        print(
            f"Warning: {arguments.host} is open to every machine that reaches it, and no --api_key is asked for.",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        make_app(worker, name, arguments),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    with config.bind_socket() as socket:
        socket.listen(config.backlog)  # who reads the line below may connect at once
        host, port = socket.getsockname()[:2]
        print(f"Serving {Path(name).name} at http://{host}:{port}", flush=True)
        try:
            server.run([socket])
        finally:
            worker.close()
