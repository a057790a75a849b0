"""`trl serve MODEL`: a model behind the routes of OpenAI and of vLLM.

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
    """The model that the options name, ready to be asked."""
    from peft import PeftModel

    from trl.cli.loading import load_pretrained
    from trl.cli.serve.worker import ModelWorker

    loaded, processor = load_pretrained(model, device=arguments.device)
    # An adapter that the name stands for is part of the weights; others come and go by their names.
    return ModelWorker(
        loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded,
        processor,
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
