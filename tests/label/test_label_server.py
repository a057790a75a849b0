"""The server as other programs meet it: who may ask, and what is refused."""

from __future__ import annotations

import http.client
import json
import socket

import pytest

from trl.cli.main import main
from trl.errors import ConfigError
from trl.label.server import HEADERS, LabelServer
from trl.label.session import Session
from trl.label.settings import ServerSettings
from trl.label.tasks import Item

ITEM = Item("<script>p</script>", ("a", "b"))
JSON = {"Content-Type": "application/json"}


class Client:
    def __init__(self, server):
        self.server, self.headers = server, {}

    def __call__(self, path, body=None, **headers):
        """Status, headers and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        given = {
            **self.headers,
            **(JSON if body is not None else {}),
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), given)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, dict(response.getheaders()), text


@pytest.fixture
def serve(tmp_path):
    opened = []

    def start(task="compare", item=ITEM, **settings):
        session = Session(task, tmp_path / "out.jsonl")
        session.add([item])
        server = LabelServer(session, ServerSettings(**settings))
        opened.append((session, server.__enter__()))
        return session, Client(server)

    yield start
    for session, server in opened:
        server.__exit__()
        session.close()


def test_an_answer_goes_through(serve):
    session, ask = serve()
    status, headers, text = ask("/api/next?rater=ada")
    shown = json.loads(text)["item"]
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert {key.lower(): value for key, value in HEADERS.items()}.items() <= {
        k.lower(): v for k, v in headers.items()
    }.items()
    status, _, text = ask("/api/answer", {"rater": "ada", "item": shown["key"], "value": 1})
    assert (status, json.loads(text)["item"]) == (200, None)
    assert session.rows()[0]["chosen"] == shown["completions"][1]
    _, _, text = ask("/api/undo", {"rater": "ada"})
    assert (json.loads(text)["item"], json.loads(text)["before"]) == (shown, 1)


def test_it_listens_on_this_machine_alone(serve):
    _, ask = serve()
    assert ask.server.socket.getsockname()[0] == "127.0.0.1"
    assert ask("/", Host="evil.example")[0] == 400


def test_a_network_needs_the_token(serve):
    _, ask = serve(share_on_lan=True)
    token = ask.server.token
    assert len(token) >= 20
    assert ask.server.socket.getsockname()[0] == "0.0.0.0"
    assert token in ask.server.lan_url
    for path in ("/", "/api/next?rater=ada", "/static/page.js", "/?token=wrong"):
        assert ask(path)[0] == 403
    assert ask("/api/undo", {"rater": "ada"})[0] == 403
    status, headers, _ = ask(f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    ask.headers = {"Cookie": headers["set-cookie"].partition(";")[0]}
    assert ask("/api/next?rater=ada")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/api/next", None, "Give your name"),
        ("/api/next?rater=%07", None, "Give your name"),
        ("/api/answer", {"rater": "ada", "item": "no", "value": 1}, "unknown to the server"),
        ("/api/answer", {"rater": "ada", "item": ITEM.key, "value": 9}, "9 is not an answer to the task 'compare'"),
        ("/api/undo", {"rater": "ada"}, "There is nothing to undo"),
        ("/api/skip", ["ada"], "Send a JSON object"),
    ],
)
def test_refused(serve, path, body, message):
    _, ask = serve()
    status, _, text = ask(path, body)
    assert status == 400
    assert message in json.loads(text)["error"]


def test_what_a_form_of_another_page_could_send_is_refused(serve):
    session, ask = serve()
    status, _, text = ask("/api/answer", {"rater": "ada", "item": ITEM.key, "value": 0}, Content_Type="text/plain")
    assert (status, json.loads(text)["error"]) == (400, "Send application/json.")
    assert session.rows() == []


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        session = Session("rate", tmp_path / "out.jsonl")
        with pytest.raises(ConfigError, match="cannot be used"):
            LabelServer(session, ServerSettings(port=taken.getsockname()[1]))
        session.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give either a file of completions"),
        (["no.jsonl"], "There is no file 'no.jsonl'"),
        (["--model_name_or_path", "gpt2"], "--dataset_name is missing"),
        (["a.jsonl", "--task", "rat"], "--task was given 'rat'"),
        (["a.jsonl", "--token", "short"], "token is too short"),
        (["a.jsonl", "--guidelines", "no.md"], "guidelines='no.md': there is no such file"),
        (["a.jsonl", "--temperature", "0"], "temperature=0.0"),
    ],
)
def test_refused_on_the_command_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert main(["label", *words]) == 2
    assert message in capsys.readouterr().err
