"""The visible loop: GRPO without a trainer raises its reward."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[2] / "examples" / "rl_loop.py"


def test_the_reward_rises(capsys):
    spec = importlib.util.spec_from_file_location("rl_loop", FILE)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    curve = loop.main()
    assert np.mean(curve[:3]) < 0.2
    assert np.mean(curve[-5:]) > 0.7
    assert "step  39   reward" in capsys.readouterr().out


def test_it_is_one_page():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 60
