"""Reward functions by hand: answers, form, code."""

from __future__ import annotations

import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl.errors import ConfigError
from trl.imports import is_available
from trl.rewards import (
    accuracy_reward,
    answers,
    boxed_format_reward,
    get_combined_reward,
    get_cosine_scaled_reward,
    get_json_reward,
    get_length_reward,
    get_regex_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
    think_tags_reward,
)
from trl.rewards.answers import agree, boxed, extract_answer, has_math_verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("first 3, then 1,234.5 dollars.", "1,234.5"),
        ("It is -7.", "-7"),
        ("x = 3/4", "3/4"),
        ("Pages 10-12", "12"),
        (r"Half of it is \frac{3}{4}.", r"\frac{3}{4}"),
        ("It is 1e-5", "1e-5"),
        ("2 + 3 = 5", "5"),
        ("7 · 9 = 63\n#### 63", "63"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("(1, 2)", "(1, 2)"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        ("nothing", None),
    ],
)
def test_answers_are_found(text, answer):
    assert extract_answer(text) == answer


def test_a_box_that_is_not_closed():
    assert boxed(r"\boxed{1 + {2}") is None


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\dfrac{2}{4}}", "1/2", 1.0),
        ("The total is $1,000.", "#### 1000", 1.0),
        ("The total is 1001", "#### 1000", 0.0),
        (r"\boxed{x + 1}", r"\boxed{x+1}", 1.0),
        ("no idea", "5", 0.0),
        ("5", " ", None),
        ("5", "5 apples", 1.0),
        (r"\boxed{2}", r"\frac{1}{2}", 0.0),
        (r"\boxed{2\pi}", r"2\pi", 1.0),
        (r"\boxed{2}", r"2\pi", 0.0),
        (r"2\pi", r"\boxed{2\pi}", 1.0),
        (r"\boxed{5}", "x = 5", 1.0),
    ],
)
@pytest.mark.parametrize("by_mathematics", [True, False])
def test_accuracy(text, solution, expected, by_mathematics, monkeypatch):
    if by_mathematics:
        pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "has_math_verify", lambda: by_mathematics)
    assert accuracy_reward([text], [solution]) == [expected]
    assert accuracy_reward([[{"role": "assistant", "content": text}]], [solution]) == [expected]


@pytest.mark.parametrize(
    ("answer", "solution", "equal"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000.0", True),
        ("$7$", "7", True),
        ("3/0", "3", False),
        ("(x-1)(x+1)", "x^2-1", False),
        ("−5", "-5", True),
        (r"3\frac{1}{2}", "31/2", False),
        (r"\frac{a+b}{2}", r"a+\frac{b}{2}", False),
        ("5x", "5", False),
        ("[0, 1)", "[0,1)", True),
        ("[0,1)", "(0,1)", False),
        ("Paris", "Paris", True),
        ("1e999999999", "1", False),
    ],
)
def test_answers_agree_as_numbers_or_as_text(answer, solution, equal):
    assert agree(answer, solution) is equal


def test_answers_agree_as_mathematics():
    pytest.importorskip("math_verify")
    texts = [r"\boxed{(x-1)(x+1)}", r"\boxed{x^2+1}", r"so it is $\{2, 1\}$", "no idea"]
    solutions = ["x^2-1", r"\boxed{x^2-1}", r"$\{1,2\}$", "5"]
    assert accuracy_reward(texts, solutions) == [1.0, 0.0, 1.0, 0.0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(accuracy_reward, texts, solutions).result() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("by_mathematics", [True, False])
@pytest.mark.parametrize(
    "text",
    ["1 " * 50_000, "\\boxed{" * 20_000, "{" * 100_000, "1," * 50_000, "1" * 200_000, "$" * 100_000, "#" * 100_000],
)
def test_long_texts_are_read_once(text, by_mathematics, monkeypatch):
    """Ten times as long takes about ten times as long: what is quadratic would take minutes."""
    if by_mathematics:
        pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "has_math_verify", lambda: by_mathematics)
    start = time.process_time()
    assert accuracy_reward([text + "x"], ["5"]) == [0.0]
    assert time.process_time() - start < 30


def test_how_answers_are_compared_is_said_once():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("trl.rewards.answers").addHandler(handler)
    has_math_verify.cache_clear()
    accuracy_reward(["1", "2"], ["1", "1"])
    accuracy_reward(["1"], ["1"])
    logging.getLogger("trl.rewards.answers").removeHandler(handler)
    assert len(said) == (0 if is_available("math_verify") else 1)
    assert all("trl[math]" in line for line in said)


def test_accuracy_after_reasoning():
    texts = ["<think>maybe 4</think> It is 5.", "<think>5</think> It is 4.", "<think>5"]
    assert reasoning_accuracy_reward(texts, ["5"] * 3) == [1.0, 0.0, 0.0]


def test_cosine_scaled_accuracy():
    """Half way between the bounds at half of the length: (1 + ½) / 2 and −(1 + ½) / 2."""
    reward = get_cosine_scaled_reward(max_len=100)
    given = {"completions": ["1", "2", "1", "2", "1"], "solution": ["1"] * 5}
    found = reward(**given, completion_ids=[[0] * n for n in (50, 50, 0, 0, 300)])
    assert found == pytest.approx([0.75, -0.75, 1.0, -1.0, 0.5])


def test_think_tags():
    texts = [
        "<think>a\nb</think>\nanswer",
        "answer",
        "<think>a",
        "<think></think><think></think>",
        "x <think>a</think>",
    ]
    assert think_format_reward(texts) == [1, 0, 0, 0, 0]
    assert think_tags_reward(texts) == [1, 0, 0.5, 0, 1]


def test_boxes():
    assert boxed_format_reward([r"\boxed{1}", "1", r"\boxed{1} \boxed{1}"]) == [1, 0, 0]


def test_overlong_completions():
    reward = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert reward(completion_ids=[[0] * n for n in (80, 85, 90, 100, 101)]) == [0, -0.25, -0.5, -1, -1]


def test_lengths():
    assert get_length_reward(10)(completion_ids=[[0] * n for n in (10, 5, 15, 40)]) == [0, -0.5, -0.5, -1]


def test_repetition():
    """Bigrams of 1 2 1 2 1: four, of which two differ."""
    reward = get_repetition_penalty_reward(ngram_size=2)
    assert reward(completion_ids=[[1, 2, 1, 2, 1], [1, 2, 3], [1]]) == [-0.5, 0, 0]
    with pytest.raises(ConfigError, match="would reward repetition"):
        get_repetition_penalty_reward(max_penalty=1.0)


def test_patterns():
    assert get_regex_reward(r"yes|no")(completions=["yes", "yes!", "no"]) == [1, 0, 1]
    assert get_regex_reward(r"\d", search=True)(completions=["a 1", "a"]) == [1, 0]


def test_json():
    schema = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "ages": {"items": {"type": "integer", "minimum": 0}},
        },
        "additionalProperties": False,
    }
    reward = get_json_reward(schema, partial=0.25)
    texts = ['{"name": "A"}', '```json\n{"name": "A", "ages": [1, 2]}\n```', '{"name": ""}', "[1]", "name: A"]
    assert reward(completions=texts) == [1, 1, 0.25, 0.25, 0]
    assert reward(completions=['{"name": "A", "ages": [-1]}', '{"name": "A", "x": 1}']) == [0.25, 0.25]
    with pytest.raises(ConfigError, match="Unknown keyword of the JSON schema 'typ'. Did you mean 'type'"):
        get_json_reward({"properties": {"a": {"typ": "string"}}})
    with pytest.raises(ConfigError, match="Invalid JSON schema: items.type: 'strng' is not valid"):
        get_json_reward({"items": {"type": "strng"}})
    with pytest.raises(ConfigError, match="Unknown keyword of the JSON schema 'tpye'"):
        get_json_reward({"anyOf": [{"additionalProperties": {"not": {"tpye": "string"}}}]})


def test_schemas_refer_to_themselves_and_to_nothing_else():
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    assert get_json_reward(tree)(completions=['{"children": [{"children": []}]}', '{"children": [1]}']) == [1, 0]
    for schema in ({"$ref": "#"}, {"$ref": "#/$defs/missing"}, {"$ref": "https://example.com/schema.json"}):
        with pytest.raises(ConfigError, match="has a reference that is not in it, or an endless one"):
            get_json_reward(schema)


def test_fences_of_json():
    reward = get_json_reward()
    texts = [
        "```json\n[1]\n```",
        "```\n[1]```\n",
        " ```json [1]```",
        "```json",
        "```",
        "[1]\n```",
        "```" + "\n" * 200_000,
    ]
    assert reward(completions=texts) == [1, 1, 1, 0, 0, 0, 0]


def test_what_python_reads_as_json_and_is_none():
    """NaN, nesting without end, a number beyond floats, true in place of 1."""
    assert get_json_reward()(completions=["[NaN]", "[" * 100_000]) == [0, 0]
    assert get_json_reward({"type": "integer"})(completions=["1e999", "3.0"]) == [0, 1]
    assert get_json_reward({"enum": [1]})(completions=["true", "1.0"]) == [0, 1]
    assert get_json_reward({"const": True})(completions=["1", "true"]) == [0, 1]


def test_other_properties():
    schema = {"properties": {"a": {}}, "additionalProperties": {"type": "string"}}
    assert get_json_reward(schema)(completions=['{"a": 1, "b": "x"}', '{"b": 1}']) == [1, 0]


def test_options_without_a_meaning():
    with pytest.raises(ConfigError, match=r"pattern='\(' is not a valid regular expression: missing \)"):
        get_regex_reward("(")
    with pytest.raises(ConfigError, match="pattern"):
        get_json_reward({"pattern": "("})
    with pytest.raises(ConfigError, match="target=0: give a number of tokens"):
        get_length_reward(0)
    with pytest.raises(ConfigError, match="ngram_size=0: give a number of tokens"):
        get_repetition_penalty_reward(0)


def test_combinations():
    def a(completions, **_):
        return [1.0, 0.5, None]

    def b(completions, **_):
        return [2.0, None, None]

    given = {"completions": ["x", "y", "z"]}
    assert get_combined_reward([a, b])(**given) == [3, 0.5, None]
    assert get_combined_reward([a, b], weights=[1, 10])(**given) == [21, 0.5, None]
    assert get_combined_reward([a, b], how="product")(**given) == [2, 0.5, None]
    assert get_combined_reward([a, b], how="min")(**given) == [1, 0.5, None]
    with pytest.raises(ConfigError, match="Unknown how 'max'"):
        get_combined_reward([a], how="max")


def test_rewards_can_be_sent_to_other_processes():
    made = [get_length_reward(3), get_json_reward({"type": "object"}), get_cosine_scaled_reward(5)]
    for reward in pickle.loads(pickle.dumps(made)):
        assert reward.__name__.endswith("_reward")
