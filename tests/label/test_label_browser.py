"""The page in a real browser: keys, phone, undo, a kill, two people, and a run that is steered through it.

Needs Chromium, its driver, and TRL_TEST_BROWSER=1: a browser has its own pace, so these run where somebody asks for them.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.conftest import MODELS, make_tokenizer
from trl.cli.main import main
from trl.label.formats import items_of
from trl.label.server import LabelServer
from trl.label.session import Session
from trl.label.settings import ServerSettings
from trl.rewards.human import HumanPreference, HumanRating

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TRL_TEST_BROWSER") or CHROMIUM is None or DRIVER is None,
        reason="needs TRL_TEST_BROWSER=1, chromium and chromedriver",
    ),
    pytest.mark.slow,
]
PATIENCE = 60.0


@contextmanager
def chromium(width=1200, height=800, dark=False):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]  # a page that still moves is missed
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        yield Person(driver)
    finally:
        driver.quit()


class Person:
    """Somebody at a browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, name):
        self.driver.get(url)
        field = self.find("#name")
        field.clear()
        field.send_keys(f"{name}\n")
        self.until(lambda: not self.find("#hello").is_displayed())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        """The text that is seen, in one go with the look for its element, for elements come and go."""
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText", selector)

    def press(self, key):
        """Press a key; wait until the page has taken it in."""
        before = self.state
        self.driver.switch_to.active_element.send_keys(key)
        self.until(lambda: self.state not in (before, True))

    def tap(self, selector):
        before = self.state
        self.find(selector).click()
        self.until(lambda: self.state not in (before, True))

    @property
    def state(self):
        """What is asked and how much was answered."""
        return self.driver.execute_script("return busy || [state.item && state.item.key, state.progress.answered]")

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.driver.page_source
            time.sleep(0.01)


class Command:
    """`trl label` in a process of its own."""

    def __init__(self, folder, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl", "label", *words, "--port", "0", "--no_open_browser"],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]

    def end(self, how):
        self.process.send_signal(how)
        self.process.communicate(timeout=PATIENCE)
        return self.process.returncode


def address_of(human):
    """Where a person is asked, as the console is told when the page is served."""
    assert human.page.session is not None
    return re.search(r"http://\S+", human.console.file.getvalue())[0]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_twenty_ratings_an_undo_a_kill_and_a_reward_model(tmp_path):
    completions = [{"prompt": "Say it: ", "completion": f"number {i}"} for i in range(20)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    words = ("completions.jsonl", "--output", "ratings.jsonl", "--no_shuffle")
    command = Command(tmp_path, *words)
    with chromium() as ada:
        ada.open(command.url, "Ada")
        for mark in "1234512345":
            ada.press(mark)
        ada.press("u")
        assert ada.text(".before") == "5\ngreat"
        assert ada.text(".completion") == "number 9"
        ada.press("4")
        ada.press("s")
        assert command.end(signal.SIGKILL) == -signal.SIGKILL
        assert len(rows_of(tmp_path / "ratings.jsonl")) == 10

        command = Command(tmp_path, *words)
        ada.open(command.url, "Ada")
        assert ada.text("#count") == "10 of 20"
        assert ada.text(".completion") == "number 11"
        for mark in "212345123":
            ada.press(mark)
        ada.find("#revisit").click()
        ada.until(lambda: ada.text(".completion") == "number 10")
        ada.press("5")
        ada.until(lambda: ada.text("#rest-title") == "That is all. Thank you!")
    assert command.end(signal.SIGINT) == 0
    rows = rows_of(tmp_path / "ratings.jsonl")
    marks = {int(row["completion"].split()[1]): round(2 * row["score"] + 3) for row in rows}
    assert [marks[i] for i in range(20)] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 4, 5, 2, 1, 2, 3, 4, 5, 1, 2, 3]

    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    names = ["--model_name_or_path", str(tmp_path / "tiny"), "--dataset_name", str(tmp_path / "ratings.jsonl")]
    assert (
        main(["reward", *names, "--output_dir", str(tmp_path / "rm"), "--max_steps", "2", "--report_to", "none"]) == 0
    )
    assert (tmp_path / "rm" / "config.json").is_file()


def test_two_people_at_once(tmp_path):
    session = Session("approve", tmp_path / "out.jsonl", raters_per_item=2)
    session.add(items_of("approve", [{"prompt": "p", "completion": f"text {i}"} for i in range(4)], "x"))
    with LabelServer(session, ServerSettings()) as server, chromium() as ada, chromium(390, 800, dark=True) as bob:
        ada.open(server.url, "Ada")
        bob.open(server.url, "Bob")
        for key in ("1", "2", "2", "2"):
            bob.tap("#choices .good")
            ada.press(key)
        assert ada.text("#rest-title") == "That is all. Thank you!"
        ada.driver.switch_to.active_element.send_keys("p")
        assert "On 4 items that several people answered, 75 % of answers are equal" in ada.text("#agreement")
        assert bob.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        colour = "return getComputedStyle(document.body).backgroundColor"
        assert bob.driver.execute_script(colour) != ada.driver.execute_script(colour)
    assert len(session.rows()) == 8
    session.close()


def test_texts_stay_texts(tmp_path):
    evil = "<img src=x onerror=\"document.title='x'\"><script>document.title='x'</script>"
    session = Session("compare", tmp_path / "out.jsonl")
    session.add(items_of("compare", [{"prompt": evil, "completions": [evil, f"{evil} "]}], "x"))
    with LabelServer(session, ServerSettings(guidelines=evil)) as server, chromium() as ada:
        ada.open(server.url, "<b>Ada</b>")
        assert ada.text("#prompt") == evil
        assert evil in ada.text(".completion")
        assert ada.text("#who") == "<b>Ada</b>"
        ada.driver.switch_to.active_element.send_keys("g")
        assert ada.text("#guidelines-text") == evil
        assert ada.driver.title == "trl label"
        assert ada.driver.find_elements("css selector", "main img, main script, dialog img") == []
    session.close()


def test_a_correction_with_the_keyboard_alone(tmp_path):
    session = Session("correct", tmp_path / "out.jsonl")
    session.add(items_of("correct", [{"prompt": "p", "completion": "It were good."}], "x"))
    keys = webdriver.Keys
    with LabelServer(session, ServerSettings()) as server, chromium() as ada:
        ada.open(server.url, "Ada")
        field = ada.driver.switch_to.active_element
        assert field.get_attribute("id") == "text"
        field.send_keys(keys.CONTROL, "a")
        field.send_keys("It was good. Seen in summer", keys.CONTROL, keys.ENTER)
        ada.until(lambda: ada.text("#rest-title") == "That is all. Thank you!")
    assert session.rows() == [{"prompt": "p", "chosen": "It was good. Seen in summer", "rejected": "It were good."}]
    session.close()


AUTOPILOT = """
setInterval(() => {
  if (busy || !state || !state.item) return;
  const first = state.item.completions[0].slice(0, 1);
  document.querySelectorAll("#choices button")[/[a-m]/.test(first) ? 4 : /[a-z]/.test(first) ? 2 : 0].click();
}, 5);
"""
"""Marks 5 for what begins with a letter from a to m, 3 for another small letter, 1 for anything else."""


def test_ppo_is_steered_through_the_page(tmp_path):
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(MODELS["gpt2"]())
    config = PPOConfig(batch_size=32, mini_batch_size=32, learning_rate=5e-3, init_kl_coef=0.0, seed=0)
    trainer = PPOTrainer(config, model, None, tokenizer)
    rate = HumanRating(tmp_path / "ratings.jsonl", ui="web", port=0, console=Console(file=io.StringIO()))
    prompts = ["Say: "] * 32
    queries = [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]
    means = []
    with chromium() as ada:
        ada.open(address_of(rate), "Ada")
        ada.driver.execute_script(AUTOPILOT)
        for _ in range(25):
            responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=1)
            marks = rate(prompts, tokenizer.batch_decode(responses))
            trainer.step(queries, responses, [torch.tensor(mark) for mark in marks])
            means.append(sum(marks) / len(marks))
    rate.page.close()
    assert sum(means[-5:]) / 5 > sum(means[:3]) / 3 + 0.5
    assert {row["score"] for row in rows_of(tmp_path / "ratings.jsonl")} == {-1.0, 0.0, 1.0}


def test_preferences_from_the_page(tmp_path):
    compare = HumanPreference(tmp_path / "pairs.jsonl", ui="web", port=0, console=Console(file=io.StringIO()))
    rewards = []
    asking = threading.Thread(target=lambda: rewards.extend(compare(["p"] * 3, ["a", "b", "c"])))
    with chromium() as ada:
        url = address_of(compare)
        asking.start()
        ada.open(url, "Ada")
        for _ in range(3):
            ada.until(lambda: "A\n" in ada.text("#completions"))
            first, second = ada.driver.execute_script("return state.item.completions")
            ada.press("1" if first < second else "2")
        asking.join(PATIENCE)
        assert ada.text("#rest-title") == "Nothing to judge right now"
    compare.page.close()
    assert rewards == [1.0, 0.0, -1.0]
    assert [(row["chosen"], row["rejected"]) for row in rows_of(tmp_path / "pairs.jsonl")] == [
        ("a", "b"),
        ("b", "c"),
        ("a", "c"),
    ]
