"""What goes to the hub: a server of our own stands for it, and what was uploaded loads again."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.hub import hf_api

from tests.trainers.ppo_support import TRIPLETS, assert_same, parameters
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead, with_value_head
from trl.models.value_heads.heads import ValueModel


class Hub(BaseHTTPRequestHandler):
    """The few answers that an upload needs. `server.repos` holds the files of every repository."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def do_POST(self):
        body = self._body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repos.setdefault(repo, {})
            return self._answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        repo, kind, _ = self.path.removeprefix("/api/models/").rsplit("/", 2)
        if kind == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer({"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1", "success": True})

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        """Quietly."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.repos = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hf_api(), "endpoint", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def downloaded(repo, folder):
    for name, content in repo.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_trainer_uploads_model_head_and_tokenizer(hub, make_ppo, own_folder, tmp_path):
    trainer = make_ppo()
    trainer.step(*TRIPLETS)
    trainer.push_to_hub("someone/walker", token="hf_x")
    folder = downloaded(hub.repos["someone/walker"], tmp_path / "there")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert_same(dict(loaded.named_parameters()), parameters(trainer))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_the_best_so_far_is_uploaded(hub, make_ppo, own_folder, tmp_path):
    trainer = make_ppo(push_to_hub_if_best_kwargs={"repo_id": "someone/best", "token": "hf_x"})
    queries, responses, scores = TRIPLETS
    trainer.step(queries, responses, scores)
    best = dict(hub.repos["someone/best"])
    trainer.step(queries, responses, [score - 1 for score in scores])
    assert hub.repos["someone/best"] == best
    trainer.step(queries, responses, [score + 1 for score in scores])
    assert hub.repos["someone/best"]["model.safetensors"] != best["model.safetensors"]


@pytest.mark.parametrize("kind", ["branch", "network"])
def test_what_gives_values_is_uploaded_with_the_model(hub, make_model, tmp_path, kind):
    torch.manual_seed(0)
    model = with_value_head(make_model("llama"), num_value_layers=int(kind == "branch"))
    if kind == "network":
        model.v_head = ValueModel.of(make_model("gpt2"))
    model.push_to_hub("someone/walker", token="hf_x")
    folder = downloaded(hub.repos["someone/walker"], tmp_path / "there")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
