"""`/image path` in a chat: what the model and a server are given, and what is no image."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from tests.cli.test_cli_chat import Notes
from tests.conftest import MODELS, make_tokenizer
from tests.vision.support import FAMILIES, llava, picture
from trl.cli.chat.arguments import Generation
from trl.cli.chat.images import for_server
from trl.cli.chat.local import LocalSpeaker
from trl.cli.chat.session import Command, Session, read_command
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Example

GREEDY = Generation(temperature=0, max_new_tokens=4)


def session_of(lines, speaker, folder) -> tuple[Session, Notes]:
    screen = Notes(lines)
    session = Session(speaker, GREEDY, screen, user="you", examples={}, save_folder=str(folder))
    session.run()
    return session, screen


def saved(folder, seed: int = 1) -> str:
    path = folder / f"a picture {seed}.png"
    picture(seed).save(path)
    return str(path)


def test_what_is_a_command():
    assert read_command("/image a picture.png") == Command("image", "a picture.png")
    assert read_command("image of a cat") is None


def test_an_image_goes_with_the_next_message(tmp_path):
    tiny = llava()
    speaker = LocalSpeaker(tiny.model, tiny.processor)
    lines = [f"/image {saved(tmp_path)}", "what is this?", "and now?"]
    session, screen = session_of(lines, speaker, tmp_path)
    first, _, second, _ = session.conversation.messages
    assert [part["type"] for part in first["content"]] == ["image", "text"]
    assert second["content"] == "and now?"
    assert "a picture 1.png" in screen.said[0]
    inputs = speaker.encode([first])
    assert (inputs["input_ids"] == tiny.processor.image_token_id).sum() == 4
    with torch.no_grad():
        likeliest = tiny.model(**inputs).logits[0, -1]
    likeliest[tiny.processor.image_token_id] = -torch.inf
    assert screen.shown.startswith(tiny.processor.tokenizer.decode(likeliest.argmax()))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_answers_are_those_of_the_rollout_engine(name, tmp_path):
    """`generate` is given token types and counts positions itself; the engine is given positions."""
    tiny = FAMILIES[name]()
    speaker, pieces = LocalSpeaker(tiny.model, tiny.processor), []
    image = {"type": "image", "image": saved(tmp_path)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "see"}]}]
    speaker.answer(messages, GREEDY, pieces.append)
    ids = speaker.encode(messages)["input_ids"][0].tolist()
    prompt = Prompt.of(speaker.images.with_images(Example(ids, ()), [image["image"]]))
    params = SamplingParams(max_new_tokens=GREEDY.max_new_tokens, temperature=0.0)
    ((sample,),) = LocalEngine(tiny.model, progress=False).generate([prompt], params, 1)
    assert "".join(pieces) == tiny.processor.tokenizer.decode(sample.ids, skip_special_tokens=True)


def test_what_cannot_be_shown_is_said(tmp_path):
    tiny = llava()
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = ["/image", "/image nowhere.png", f"/image {tmp_path / 'broken.png'}"]
    session, screen = session_of(lines, LocalSpeaker(tiny.model, tiny.processor), tmp_path)
    assert session.images == []
    missing, nowhere, broken = screen.said
    assert "/image photo.jpg" in missing
    assert "nowhere.png" in nowhere
    assert "broken.png" in broken
    text_model = LocalSpeaker(MODELS["llama"](), make_tokenizer())
    _, screen = session_of([f"/image {saved(tmp_path)}"], text_model, tmp_path)
    assert "cannot read images" in screen.said[-1]


def test_a_server_is_sent_the_image_itself(tmp_path):
    parts = [{"type": "image", "image": saved(tmp_path)}, {"type": "text", "text": "see"}]
    ((message),) = for_server([{"role": "user", "content": parts}])
    image, text = message["content"]
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == picture(1).convert("RGB").tobytes()
    assert text == {"type": "text", "text": "see"}
