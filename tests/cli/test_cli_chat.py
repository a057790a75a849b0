"""`trl chat`, as a person sees it in a terminal, and as a server is asked."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import MODELS, make_tokenizer
from tests.processes import fast_python
from trl.cli.chat.arguments import ChatArguments, Generation
from trl.cli.chat.command import read_examples
from trl.cli.chat.local import load_speaker
from trl.cli.chat.screen import Screen
from trl.cli.chat.server import ServerError, ServerSpeaker
from trl.cli.chat.session import Command, Session, read_command, with_changes
from trl.cli.chat.talk import Conversation, Stream, TooLong
from trl.cli.main import main
from trl.errors import ConfigError
from trl.models.config import ModelConfig

PATIENCE = 180.0
SPECIAL = [0, 1, 2, 3, 4, 5, *make_tokenizer()("\n")["input_ids"]]
GREEDY = Generation(temperature=0, max_new_tokens=8)


def save_model(folder, *, template=True, context=100_000):
    """A tiny model that never ends, nor its line, so that an answer is as long as it may be."""
    torch.manual_seed(0)
    model = MODELS["llama"](max_position_embeddings=context)
    model.generation_config.suppress_tokens = SPECIAL
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("chat") / "tiny")


def speaker(folder, **options):
    return load_speaker(ChatArguments(), ModelConfig(model_name_or_path=folder, dtype="auto", **options))


class Terminal:
    """A pseudo-terminal of 24 × 100 with `trl` in it. Every wait ends after PATIENCE seconds."""

    TRL = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from trl.cli.main import main; sys.exit(main())"
    )

    def __init__(self, *words, folder):
        self.screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            [fast_python(), "-c", self.TRL, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"},
        )
        os.close(terminal)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def type(self, text):
        os.write(self.screen, text.encode())

    def wait_for(self, pattern):
        """What stands on the screen up to the first match of `pattern` that was not waited for yet, without colours."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, plain(self.seen))):
            readable, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"{pattern!r} did not come; on the screen: {self.seen[-2000:]!r}"
            self.seen += self._read()
        text = plain(self.seen)
        self.seen = text[found.end() :]
        return text[: found.end()]

    def _read(self):
        try:
            data = os.read(self.screen, 4096)
        except OSError:  # what Linux says at the end
            data = b""
        assert data, f"the program ended; on the screen: {self.seen[-2000:]!r}"
        return self.decoder.decode(data)

    def status(self):
        with contextlib.suppress(OSError):
            while select.select([self.screen], [], [], 0.1)[0] and os.read(self.screen, 4096):
                pass
        return self.process.wait(timeout=PATIENCE)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=PATIENCE)
        os.close(self.screen)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x01\x02\r]", "", text)


@contextlib.contextmanager
def terminal(*words, folder):
    made = Terminal(*words, folder=folder)
    try:
        yield made
    finally:
        made.close()


def test_a_session_in_a_terminal(tiny, tmp_path):
    words = ("chat", "--model_name_or_path", tiny, "--user", "you", "--max_new_tokens", "12", "--seed", "1")
    with terminal(*words, folder=tmp_path) as screen:
        assert "100,000 tokens of context" in screen.wait_for("you › ")
        screen.type("Hello\n")
        assert "12 tokens" in screen.wait_for(r"tiny › (?s:.)*tokens/s")

        screen.wait_for("you › ")
        screen.type("set max_new_tokens=90000; temperature=0.5\n")
        screen.wait_for("max_new_tokens = 90000, temperature = 0.5")
        screen.wait_for("you › ")
        screen.type("Tell me all\n")
        screen.wait_for(r"tiny › [^\n]{20}")
        screen.type("\x03")
        screen.wait_for(r"Interrupted\.")

        screen.wait_for("you › ")
        screen.type("set max_new_tokens=many\n")
        screen.wait_for("max_new_tokens was given 'many', but takes an int.")
        screen.wait_for("you › ")
        time.sleep(0.5)  # Python loses a signal that comes just before it begins to wait for keys
        screen.type("\x03")
        screen.wait_for("\nCtrl-C once more, or `exit`, leaves.")
        screen.wait_for("you › ")
        screen.type("save talk\n")
        screen.wait_for(r"The conversation is in chat_history/talk\.json\.")
        screen.wait_for("you › ")
        screen.type("exit\n")
        assert screen.status() == 0
    saved = json.loads((tmp_path / "chat_history" / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "user", "assistant"]
    assert saved["messages"][2]["content"] == "Tell me all"
    assert len(saved["messages"][3]["content"]) >= 20
    assert saved["settings"]["temperature"] == 0.5


def test_redirected_output_is_the_answers_alone(tiny, tmp_path):
    words = ["chat", "--model_name_or_path", tiny, "--max_new_tokens", "9", "--temperature", "0"]
    done = subprocess.run(
        [fast_python(), "-m", "trl", *words], input="Hello\nexit\n", capture_output=True, text=True, timeout=PATIENCE
    )
    expected: list[str] = []
    speaker(tiny).answer(
        [{"role": "user", "content": "Hello"}], Generation(temperature=0, max_new_tokens=9), expected.append
    )
    assert (done.stdout, done.stderr, done.returncode) == ("".join(expected).strip(" ") + "\n", "", 0)


# ---- the model in this process ----


def test_greedy_answers_are_those_of_the_model(tiny):
    talks = speaker(tiny)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = talks.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for _ in range(8):
        logits = talks.model(torch.tensor([ids])).logits[0, -1]
        logits[SPECIAL] = -torch.inf
        ids.append(int(logits.argmax()))
    pieces: list[str] = []
    assert talks.answer([{"role": "user", "content": "Hi"}], GREEDY, pieces.append) == 8
    assert "".join(pieces) == talks.tokenizer.decode(ids[-8:])


def test_an_adapter_is_found_in_its_folder_and_changes_the_answer(tiny, tmp_path):
    torch.manual_seed(0)
    base = speaker(tiny)
    adapted = get_peft_model(base.model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = tiny
    adapted.save_pretrained(tmp_path)
    answers = []
    for folder, options in ((str(tmp_path), {}), (tiny, {"adapter_name_or_path": str(tmp_path)}), (tiny, {})):
        pieces: list[str] = []
        speaker(folder, **options).answer([{"role": "user", "content": "Hi"}], GREEDY, pieces.append)
        answers.append("".join(pieces))
    assert answers[0] == answers[1] != answers[2]


def test_the_tokenizer_of_an_adapter_is_the_one_that_it_was_trained_with(tiny, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    get_peft_model(speaker(tiny).model, LoraConfig(r=2)).save_pretrained(tmp_path)
    assert speaker(tiny, adapter_name_or_path=str(tmp_path)).tokenizer.chat_template == tokenizer.chat_template


def test_encoder_decoders_answer(tmp_path):
    torch.manual_seed(0)
    MODELS["t5"]().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    talks, pieces = speaker(str(tmp_path)), []
    talks.model.generation_config.suppress_tokens = [*SPECIAL, *range(len(talks.tokenizer), 99)]
    assert talks.answer([{"role": "user", "content": "Hi"}], GREEDY, pieces.append) == 8
    assert len("".join(pieces)) == 8


def test_without_a_chat_template_the_text_is_continued(tmp_path):
    talks = speaker(save_model(tmp_path / "base", template=False))
    assert "no chat template" in talks.notes[0]
    messages = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "two"}]
    assert talks.tokenizer.decode(talks.encode(messages)["input_ids"][0]) == "One\ntwo"


def test_messages_beyond_the_context(tmp_path):
    """Around the n characters of a message the template has 19 tokens."""
    talks = speaker(save_model(tmp_path / "short", context=64))
    with pytest.raises(TooLong, match="has 129 tokens, and the model's context has 64"):
        talks.answer([{"role": "user", "content": "x" * 110}], GREEDY, print)
    assert talks.answer([{"role": "user", "content": "x" * 25}], Generation(max_new_tokens=500), lambda _: None) == 20


# ---- pieces of text and conversations ----


@pytest.mark.parametrize(
    ("pieces", "stop", "said"),
    [
        (["Hel", "lo"], None, ["Hel", "lo"]),
        (["one\nUs", "er: two"], ["\nUser:"], ["one"]),
        (["one\nU", "nder"], ["\nUser:"], ["one", "\nUnder"]),
        (["a", "b"], ["bc"], ["a", "b"]),
        (["xAyB"], ["B", "A"], ["x"]),
    ],
)
def test_stop_texts_are_not_shown(pieces, stop, said):
    heard: list[str] = []
    stream = Stream(heard.append, stop)
    for piece in pieces:
        stream.put(piece)
    stream.end()
    assert heard == said


def test_an_answer_of_control_characters_is_shown_as_symbols(capsys):
    screen = Screen()
    with screen.answer("tiny") as show:
        for piece in ("\x1b[2J", "\x07\x9b", "\x00"):
            show(piece)
    screen.table("Settings", [("system", "\x1b]0;title\x07")])
    shown = capsys.readouterr().out
    assert shown.startswith("␛[2J␇␛[␀\n")
    assert "␛]0;title␇" in shown


def test_the_oldest_turn_is_left_out_first():
    conversation = Conversation()
    for i in range(3):
        conversation.add("user", f"question {i}")
        conversation.add("assistant", f"answer {i}")
    assert conversation.drop_oldest()
    seen = [message["content"] for message in conversation.seen("Be brief.")]
    assert seen == ["Be brief.", "question 1", "answer 1", "question 2", "answer 2"]
    assert conversation.drop_oldest()
    assert not conversation.drop_oldest()
    assert len(conversation.messages) == 6


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("exit", Command("exit")),
        (" /Clear ", Command("clear")),
        ("help me", None),
        ("save", Command("save")),
        ("save talk", Command("save", "talk")),
        ("save me from this", None),
        ("example code", Command("example", "code")),
        ("set top_p=0.9", Command("set", "top_p=0.9")),
        ("set the table", None),
        ("/etc is a folder", None),
        ("/etc/hosts", None),
        ("", None),
    ],
)
def test_commands_are_told_from_messages(line, command):
    assert read_command(line) == command


def test_an_unknown_command_is_no_message():
    with pytest.raises(ConfigError, match=r"Unknown command '/rest'\. Did you mean '/reset'\? Known: /help"):
        read_command("/rest")


def test_set_changes_what_it_names():
    changed = with_changes(Generation(), "temperature=0.5; top-k = 7;stop=END; system_prompt=Be brief.;do_sample=no;")
    assert changed == Generation("Be brief.", do_sample=False, temperature=0.5, top_k=7, stop=["END"])
    assert with_changes(changed, "temperature=none").temperature is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature=1", "Unknown setting 'temprature'. Did you mean 'temperature'?"),
        ("temperature=-1", "temperature=-1.0: give 0 \\(the most likely token\\) or a positive number."),
        ("top_k=few", "top_k was given 'few', but takes an int or none."),
        ("top_k=1; hot", "'hot' is not a setting: write key=value."),
    ],
)
def test_set_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        with_changes(Generation(), text)


class Notes:
    """A screen that keeps what it is told."""

    def __init__(self, lines):
        self.lines, self.said, self.shown = iter(lines), [], ""

    def ask(self, user):
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None

    @contextlib.contextmanager
    def answer(self, name):
        def show(piece):
            self.shown += piece

        yield show

    def greet(self, name, details, notes):
        self.said += notes

    def close_answer(self, tokens, seconds, *, interrupted):
        self.said += ["interrupted"] if interrupted else []

    def note(self, text):
        self.said.append(text)

    def error(self, text):
        self.said.append(f"error: {text}")

    def echo(self, user, text):
        pass

    def table(self, title, rows):
        self.said += [title, *(name for name, _ in rows)]

    def clear(self):
        self.shown = ""


class Parrot:
    """Answers with the last message, remembers what it saw, and has room for three messages."""

    name, details, notes = "parrot", "green", ()

    def __init__(self):
        self.seen = []

    def answer(self, messages, generation, say):
        if len(messages) > 3:
            raise TooLong("It is too long.")
        self.seen.append([message["content"] for message in messages])
        last = messages[-1]["content"]
        if last == "hush":
            raise KeyboardInterrupt
        say(last[:2])
        if last == "halt":
            raise KeyboardInterrupt
        say(last[2:])
        return 1


def talk(lines, folder, **options):
    screen, parrot = Notes(lines), Parrot()
    examples = {"greet": "good day"}
    session = Session(parrot, Generation(**options), screen, user="you", examples=examples, save_folder=str(folder))
    session.run()
    return session, screen, parrot


def test_old_turns_are_dropped_and_that_is_said_once(tmp_path):
    session, screen, parrot = talk(["one", "two", "three", "four"], tmp_path)
    assert parrot.seen[2:] == [["two", "two", "three"], ["three", "three", "four"]]
    assert screen.said == ["The conversation is longer than the model's context: the oldest turns are left out."]
    assert len(session.conversation.messages) == 8


def test_an_interrupted_answer_is_kept_and_an_empty_turn_is_not(tmp_path):
    session, screen, _ = talk(["halt", "hush"], tmp_path)
    assert [message["content"] for message in session.conversation.messages] == ["halt", "ha"]
    assert screen.said == ["interrupted", "interrupted"]


def test_reset_clear_example(tmp_path):
    session, screen, parrot = talk(["set seed=3", "example greet", "reset", "set seed=4", "one", "clear"], tmp_path)
    assert parrot.seen == [["good day"], ["one"]]
    assert session.conversation.messages == []
    assert session.generation.seed == 4
    assert screen.shown == ""
    _, screen, _ = talk(["example great", "example", "help"], tmp_path)
    assert screen.said[0] == "error: Unknown example 'great'. Did you mean 'greet'? Known: greet."
    assert screen.said[1:3] == ["Examples", "greet"]
    assert "save [NAME]" in screen.said


def test_save_keeps_what_another_conversation_wrote(tmp_path):
    talk(["one", "save talk", "two", "save talk"], tmp_path)
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 4
    _, screen, _ = talk(["three", "save talk"], tmp_path)
    assert "talk.json already holds another conversation" in screen.said[0]


def test_examples_of_a_file(tmp_path):
    (tmp_path / "examples.yaml").write_text("greet: Good day\nask: {text: 'How are you?'}\n")
    examples = read_examples(str(tmp_path / "examples.yaml"))
    assert (examples["greet"], examples["ask"]) == ("Good day", "How are you?")
    (tmp_path / "examples.yaml").write_text("greet: [1, 2]\n")
    with pytest.raises(ConfigError, match="'greet' is not a text"):
        read_examples(str(tmp_path / "examples.yaml"))
    (tmp_path / "examples.yaml").write_text("greet: {text: Why?}\n")
    with pytest.raises(ConfigError, match="is not YAML: while parsing a flow mapping"):
        read_examples(str(tmp_path / "examples.yaml"))


# ---- a server ----


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that says "Hello", and the second half of it only when `go` is set."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.go, self.bodies, self.headers, self.refusal = threading.Event(), [], [], None
        self.stream = None
        self.models = {"data": [{"id": "org/hello-1b"}]}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(self.headers)
        if self.server.refusal:
            self._send(*self.server.refusal)
        elif self.server.stream is not None:
            self._say(self.server.stream)
        elif len(body["messages"]) > 3:
            self._send(400, {"error": {"message": "This model's maximum context length is 3 messages."}})
        else:
            self._stream()

    def _stream(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            self._event({"choices": [{"delta": {"content": "Hel"}}]})
            self.server.go.wait(PATIENCE)
            self._event({"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"completion_tokens": 2}})
            self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, stream):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(stream)

    def _event(self, data):
        self.wfile.write(f": comment\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _send(self, code, answer):
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield made
    made.go.set()
    made.shutdown()
    made.server_close()
    thread.join(PATIENCE)


def test_a_session_with_a_server_in_a_terminal(server, tmp_path):
    with terminal("chat", "--server", server.url, "--user", "you", folder=tmp_path) as screen:
        assert f"at {server.url}/v1" in screen.wait_for("you › ")
        screen.type("Hi\n")
        screen.wait_for("org/hello-1b › Hel")  # the rest has not been sent
        screen.type("\x03")
        screen.wait_for(r"Interrupted\.")
        server.go.set()
        screen.wait_for("you › ")
        screen.type("Again\n")
        screen.wait_for("org/hello-1b › Hello\n2 tokens")
        screen.wait_for("you › ")
        screen.type("\x04")
        assert screen.status() == 0
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Hi", "Hel", "Again"]
    assert server.bodies[0]["stream"] is True


def test_what_a_server_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server.go.set()
    asked = ServerSpeaker(server.url + "/v1/", "other", template_kwargs={"enable_thinking": False})
    pieces: list[str] = []
    generation = Generation(do_sample=False, max_new_tokens=7, top_k=3, stop=["lo"])
    assert asked.answer([{"role": "user", "content": "Hi"}], generation, pieces.append) == 2
    assert pieces == ["He", "l"]
    assert server.headers[0]["Authorization"] == "Bearer a-key"
    assert server.bodies[0] == {
        "model": "other",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.0,
        "top_k": 3,
        "stop": ["lo"],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_what_a_server_refuses(server, monkeypatch):
    asked = ServerSpeaker(server.url)
    assert asked.name == "org/hello-1b"
    long = [{"role": "user", "content": "Hi"}] * 4
    with pytest.raises(TooLong, match="maximum context length is 3 messages"):
        asked.answer(long, Generation(), print)
    server.refusal = (401, {"error": {"message": "no key", "type": "auth"}})
    with pytest.raises(ServerError, match=r"refused \(401\): no key Set the API key in .* OPENAI_API_KEY"):
        asked.answer(long, Generation(), print)
    server.refusal = (500, {"detail": "broken"})
    with pytest.raises(ServerError, match=r"refused \(500\): broken"):
        asked.answer(long, Generation(), print)


def test_a_server_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert main(["chat", "--server", "http://127.0.0.1:1"]) == 2
    assert "server=http://127.0.0.1:1/v1: it cannot be reached" in capsys.readouterr().err
    assert main(["chat", "--server", "localhost:8000"]) == 2
    assert "server='localhost:8000' is not a URL" in capsys.readouterr().err


def test_a_server_of_another_kind(server):
    server.models = ["a", "list"]
    with pytest.raises(ServerError, match="does not respond like an OpenAI-compatible server: b'\\[\"a"):
        ServerSpeaker(server.url)


def test_the_hubs_token_stays_here(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    server.go.set()
    ServerSpeaker(server.url).answer([{"role": "user", "content": "Hi"}], Generation(), lambda _: None)
    assert "authorization" not in server.headers[0]


CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (CHUNK, "broke off in the middle"),
        (b"", "broke off in the middle"),
        (b'data: {"choices": [1]}\n\n', "does not respond like an OpenAI-compatible server"),
        (b'data: {"choices": 1}\n\n', "does not respond like"),
        (b'data: {"choices": {"delta": {"content": "a"}}}\n\n', "does not respond like"),
        (b'data: {"choices": [{"delta": "a"}]}\n\n', "does not respond like"),
        (b'data: {"choices": [{"delta": {"content": 5}}]}\n\n', "does not respond like"),
        (b'data: {"choices": [{"delta": {"content": ["a"]}}]}\n\n', "does not respond like"),
        (b'data: {"choices": [], "usage": {"completion_tokens": "many"}}\n\n', "does not respond like"),
        (b'data: {"choices": [], "usage": [1]}\n\n', "does not respond like"),
        (b"data: [1, 2]\n\n", "does not respond like"),
        (b"data: 7\n\n", "does not respond like"),
        (b"data: null\n\n", "does not respond like"),
        (b"data: {\n\n", "does not respond like"),
        (b"data: " + DEEP + b"\n\n", "does not respond like"),
        (b'data: {"choices": ' + DEEP + b"}\n\n", "does not respond like"),
        (b'data: {"error": {"message": "out of memory"}}\n\n', "broke off: out of memory"),
        (b'data: {"error": ["out", "of"]}\n\n', "broke off: "),
        (b"\xff\xfe\x00data: ", "broke off in the middle"),
        (b"<html>" * 100, "broke off in the middle"),
    ],
)
def test_no_answer_ends_the_session(server, tmp_path, stream, message):
    server.stream = stream
    screen = Notes(["Hi", "set seed=1"])
    asked = ServerSpeaker(server.url)
    Session(asked, Generation(), screen, user="you", examples={}, save_folder=str(tmp_path)).run()
    assert screen.said[0].startswith("error: ")
    assert message in screen.said[0]
    assert "\n" not in screen.said[0]
    assert screen.said[1:] == ["seed = 1"]


def test_halves_of_characters_are_shown_and_saved(server, tmp_path):
    server.stream = (
        b'data: {"choices": [{"delta": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    )
    screen = Notes(["Hi", "save odd"])
    Session(ServerSpeaker(server.url), Generation(), screen, user="you", examples={}, save_folder=str(tmp_path)).run()
    assert screen.shown == "a?b"
    assert json.loads((tmp_path / "odd.json").read_text())["messages"][1]["content"] == "a?b"


def test_the_hub_may_be_offline(server, tmp_path):
    server.go.set()
    done = subprocess.run(
        [sys.executable, "-m", "trl", "chat", "--server", server.url],
        input="Hello\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (done.stdout, done.returncode) == ("Hello\n", 0), done.stderr


# ---- the command ----


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'accelerate'}"
    code = f"import sys; from trl.cli.main import main; main(['chat', '--help']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.endswith("set()\n")
    assert "--system_prompt" in done.stdout
    assert "--lora_r" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", "./no"], "there is no such folder"),
        (["--temprature", "1"], "Unknown option --temprature. Did you mean '--temperature'"),
        (["--top_p", "2"], "top_p=2.0: give a probability above 0 and up to 1."),
        (["--examples_path", "no.yaml"], "--examples_path no.yaml: there is no such file."),
    ],
)
def test_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *words]) == 2
    assert message in capsys.readouterr().err


def test_speaker_says_what_it_is(tiny):
    assert speaker(tiny).name == "tiny"
    assert "float32 on cpu" in speaker(tiny).details
