"""The page in a real browser: charts are drawn, nothing fails, and what a model wrote stays text."""

from __future__ import annotations

import json
import math

import pytest

from tests.label.test_label_browser import chromium, pytestmark  # noqa: F401
from trl.report.page import write_comparison, write_report


def run_file(folder, steps, **more):
    log = [
        {"step": i, "loss": math.exp(-i / steps), "reward": i / steps, "learning_rate": 1e-3}
        for i in range(1, steps + 1)
    ]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"log_history": log, "max_steps": steps, **more}))
    return folder


def errors(person):
    return [entry["message"] for entry in person.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_charts_are_drawn_and_switched(tmp_path):
    evil = "</script><img src=x onerror=\"document.title='x'\">"
    rows = [{"prompt": evil, "completions": [evil]}]
    page = write_report(run_file(tmp_path / "run", 3000, rows=rows, again={"config.yaml": "seed: 1\n"}))
    with chromium() as person:
        person.driver.get(page.as_uri())
        person.until(lambda: len(person.driver.find_elements("css selector", ".plot canvas")) == 2)
        for switch in ("#smooth", "#log"):
            person.find(switch).click()
        person.find(".copy").click()
        person.until(lambda: person.text(".copy") == "Copied")
        assert evil in person.text(".prompt")
        assert person.driver.title.startswith("run")
        assert errors(person) == []


def test_a_comparison_is_drawn(tmp_path):
    runs = [run_file(tmp_path / name, 50, options={"seed": name}) for name in ("a", "b")]
    page = write_comparison(runs, tmp_path / "comparison.html")
    with chromium(390, 800, dark=True) as person:
        person.driver.get(page.as_uri())
        person.until(lambda: person.driver.find_elements("css selector", ".plot canvas") != [])
        assert person.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert errors(person) == []


@pytest.mark.parametrize("low", [100000.1, 1e-7, 0.0])
def test_ticks_never_repeat(tmp_path, low):
    log = [{"step": i, "loss": low + i * max(low, 1.0) * 1e-6} for i in range(1, 5)]
    (tmp_path / "run.json").write_text(json.dumps({"log_history": log}))
    with chromium() as person:
        person.driver.get(write_report(tmp_path).as_uri())
        ticks = [low + i * max(low, 1.0) * 1e-6 for i in range(5)]
        shown = person.driver.execute_script("return tickLabels(arguments[0])", ticks)
        assert len(set(shown)) == len(ticks)
