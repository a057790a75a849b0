"""Whatever comes from outside: an answer or an error of ours, never a traceback, a hang, or a wrong number in silence.

A few examples each here, always the same; `FUZZ_EXAMPLES=5000 pytest tests/fuzz` tries more, and others every time.
"""

from __future__ import annotations

import json
import math
import os
import string
from contextlib import suppress

import torch
from datasets import IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tokenizer
from trl.cli.commands import methods
from trl.cli.train import _training_arguments
from trl.data.encode import EncodeSettings, decode, encode_dataset
from trl.errors import ConfigError, DataError
from trl.printable import printable
from trl.report.page import write_report
from trl.rewards import accuracy_reward, answers, get_json_reward
from trl.rewards.call import RewardError, call_rewards
from trl.rewards.code import code_of
from trl.rewards.reward import Samples, make_rewards

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

CONTROLS = "\x00\x07\x1b\x7f\x9b\u202e\n\t"
texts = st.text(st.characters() | st.sampled_from(CONTROLS), max_size=40)
numbers = st.one_of(
    st.integers(-3, 10),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, 2**63, 2e5, math.nan, math.inf, -math.inf]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)

METHOD = methods()["sft"]
PARSER = METHOD.parser()
OPTIONS = sorted(name for name in PARSER.options if name not in ("output_dir", "deepspeed", "fsdp_config"))
SAFE = (
    "learning_rate",
    "seed",
    "max_length",
    "per_device_train_batch_size",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
)


@fuzz
@given(st.dictionaries(st.sampled_from(SAFE), numbers, min_size=1, max_size=3))
def test_options(tmp_path_factory, options):
    """Through the command line's own parser and configuration: finite, in bounds, or an error of ours."""
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name}", str(value) if abs(value) < 10**300 else "1e400")
    ]
    words += ["--output_dir", str(tmp_path_factory.getbasetemp()), "--use_cpu", "--report_to", "none"]
    try:
        config = _training_arguments(METHOD, PARSER.parse(words))
    except ConfigError as error:
        assert any(name in str(error) for name in options)  # noqa: PT017
        return
    assert all(math.isfinite(getattr(config, name)) for name in options if getattr(config, name) is not None)
    assert config.learning_rate >= 0
    assert 0 <= config.seed < 2**32
    assert config.per_device_train_batch_size >= 1


@fuzz
@given(st.lists(st.sampled_from([f"--{name}" for name in OPTIONS]) | texts, max_size=6))
def test_words(words):
    with suppress(ConfigError):
        PARSER.parse(words)


yaml_texts = st.one_of(
    texts,
    st.text(st.sampled_from(string.ascii_lowercase[:4] + ":-&*{}[]!|>#\"'\n  1.<"), max_size=60),
    st.dictionaries(st.sampled_from(OPTIONS), json_values, max_size=3).map(
        lambda d: json.dumps(d, allow_nan=False, default=str) if _is_json(d) else ""
    ),
    st.sampled_from(
        [
            "a: &a [1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
            + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("bcdefg", "cdefgh", strict=True)),
            "&a a: *a",
            "a: &a [*a]",
            "1: 2",
            "null: 2",
            "[a, b]: 2",
            "seed: 1\nseed: 2",
            "model_init_kwargs: {a: 1, a: 2}",
            "seed: 2001-99-99",
            "[" * 5000,
            "max_seq_length: 1\nmax_length: 2",
        ]
    ),
)


def _is_json(value) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@fuzz
@given(yaml_texts)
def test_yaml(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(text, errors="replace")
    try:
        PARSER.parse(["--config", str(file)])
    except ConfigError as error:
        assert "fuzz.yaml" in str(error) or "two names" in str(error)  # noqa: PT017


ROWS = {
    "text": ["text"],
    "chat": ["messages"],
    "pairs": ["prompt", "chosen", "rejected"],
    "ids": ["input_ids"],
    "tools": ["messages", "tools"],
    "labelled": ["prompt", "completion", "label"],
}
TOKENIZER = make_tokenizer()
cells = st.one_of(
    texts,
    values,
    st.lists(st.integers(-2, 80) | st.none() | st.integers(), max_size=6),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": texts | st.none()}),
        max_size=3,
    ),
)


@fuzz
@given(st.data())
def test_rows(data):
    """Rows of a stream, where no table has checked types: encoded to tokens of the vocabulary, or named."""
    names = ROWS[data.draw(st.sampled_from(sorted(ROWS)))]
    row = {name: data.draw(cells) for name in names}
    stream = IterableDataset.from_generator(lambda: iter([row, row]))
    try:
        encoded = encode_dataset(stream, TOKENIZER, settings=EncodeSettings(vocabulary=len(TOKENIZER))).dataset
        for each in encoded:
            for example in decode(each):
                ids = [*example.prompt, *(token for c in example.completions for token in c.ids)]
                assert all(0 <= token < len(TOKENIZER) for token in ids)
    except DataError as error:
        assert printable(str(error))  # noqa: PT017


@fuzz
@given(
    st.sampled_from(
        ["run.json", "log_history.jsonl", "before_after.jsonl", "README.md", "config.json", "completions/a.parquet"]
    ),
    st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()),
)
def test_reports(tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("report")
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 3, "loss": 1.25}]}))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    assert "loss" in write_report(folder).read_text()


@fuzz
@given(values | st.lists(scalars, min_size=2, max_size=2))
def test_rewards(outcome):
    rewards = make_rewards([lambda completions, **_: outcome])
    try:
        found = call_rewards(rewards, Samples(["p", "q"], ["a", "b"])).values
    except RewardError as error:
        assert "Sample" in str(error)  # noqa: PT017
        return
    assert len(outcome) == 2
    for value, given_value in zip(found.flatten().tolist(), outcome, strict=True):
        assert math.isnan(value) if given_value is None else value == torch.tensor(float(given_value)).item()


@fuzz
@given(texts, texts)
def test_answers(text, solution):
    answers.has_math_verify.cache_clear()
    for found in accuracy_reward([text], [solution]):
        assert found in (0.0, 1.0, None)
    assert accuracy_reward([f"\\boxed{{{len(text)}}}"], [f"#### {len(text)}"]) == [1.0]
    assert get_json_reward()(completions=[text, json.dumps(text)])[1] == 1.0
    assert code_of(f"```python\n{text.replace('`', '')}\n```") == f"{text.replace('`', '')}\n"


@fuzz
@given(texts)
def test_what_a_terminal_is_shown(text):
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert printable(shown) == shown
    if text.isprintable() and text.isascii():
        assert shown == text


def test_sequences_of_terminals_are_symbols():
    assert printable("a\x1b]0;title\x07b") == "a␛]0;title␇b"
    assert printable("\x9b2J\x7f\r") == "␛[2J␡␍"
    assert printable("\u202eabc") == "�abc"
