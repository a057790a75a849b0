"""`trl serve MODEL`: serve a model over HTTP with the routes of OpenAI and of vLLM.

trl serve Qwen/Qwen2.5-0.5B-Instruct
trl serve ./my-model --port 8001 --dtype bfloat16
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trl.cli.parser import ParsedOptions
from trl.cli.serve.arguments import KEY, ServeArguments
from trl.cli.train import model_to_load
from trl.errors import ConfigError
from trl.imports import require
from trl.models.config import ModelConfig

if TYPE_CHECKING:
    from trl.cli.serve.worker import ModelWorker


def run(arguments: ServeArguments, given: ParsedOptions) -> int:
    arguments.api_key = arguments.api_key or os.environ.get(KEY)
    require("starlette", to="trl serve")
    require("uvicorn", to="trl serve")
    name = given.rest[0] if given.rest else given.values.get("model_name_or_path")
    if name is None:
        raise ConfigError("trl serve takes a model: trl serve MODEL [--port 8000].")
    serve(load_worker(arguments, model_to_load(given, name)), arguments.served_model_name or name, arguments)
    return 0


def load_worker(arguments: ServeArguments, model: ModelConfig) -> ModelWorker:
    """Load the model that the options name, and start its worker."""
    from peft import PeftModel

    from trl.cli.loading import load_pretrained
    from trl.cli.serve.worker import ModelWorker

    loaded, processor = load_pretrained(model, device=arguments.device)
    # An adapter given as the model itself is merged into the weights; others are loaded and unloaded by requests.
    return ModelWorker(
        loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded,
        processor,
        max_tokens_alive=arguments.max_tokens_alive,
        max_waiting=arguments.max_waiting,
        template_kwargs=arguments.chat_template_kwargs,
    )


def serve(worker: ModelWorker, name: str, arguments: ServeArguments) -> None:
    """Serve until the process receives a signal to stop."""
    import uvicorn

    from trl.cli.serve.app import make_app

    if not arguments.is_private and arguments.api_key is None:
        print(
            f"Warning: {arguments.host} is open to every machine that can reach it, without a key: set --api_key.",
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
        socket.listen(config.backlog)  # clients may connect as soon as they read the line below
        host, port = socket.getsockname()[:2]
        print(f"Serving {Path(name).name} at http://{host}:{port}", flush=True)
        try:
            server.run([socket])
        finally:
            worker.close()
