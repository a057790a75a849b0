"""`trl demo`: the three steps of reinforcement learning from human feedback, on film reviews that a grammar writes.

1. supervised fine-tuning    a model learns to write reviews, positive and negative ones
2. reward model              a classifier learns which of two reviews an annotator prefers; or a given one is used
3. PPO                       the model learns to write positive reviews, with a KL penalty towards the model of step 1

The annotator is the grammar, which compares reviews that the model of step 1 wrote. PPO sees only the classifier's
rewards.

trl demo                                  a GPT-2 of 1.4 million parameters, trained from scratch
trl demo --model_name_or_path gpt2 --reward_model_name_or_path lvwerra/distilbert-imdb
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from trl.demo.judge import WordJudge, count_endings, judge, sentence_about, side_of
from trl.demo.options import DemoArguments
from trl.demo.reviews import load_reviews
from trl.demo.sample import prompt_openings, sample
from trl.demo.show import few_threads, quiet, step, table_of_samples, table_of_verdicts
from trl.demo.steps import STAGES, Reward, continuations, examine, fine_tune, learn_rewards, load, recipes, reinforce
from trl.report.page import write_report
from trl.report.record import COMPARISONS_FILE, SUMMARY_FILE
from trl.rewards.classifier import ClassifierReward
from trl.rewards.model import RewardModel

INTERRUPTED = 130

TRIES = 6
"""Maximum number of samples per prompt in the search for positive ones."""

COMPARED = "an annotator, played by the grammar, compares what the fine-tuned model wrote: two reviews, or one and one of the corpus"
LABELLED = (
    "The grammar also labelled the pairs from which the reward model learned; PPO was given that model's rewards alone."
)


def run_demo(options: DemoArguments, console: Console | None = None) -> int:
    """Run the demo. Return the exit status."""
    console = console or Console()
    tiny = options.model_name_or_path is None
    with quiet(), few_threads() if tiny else nullcontext():
        try:
            show(options, console)
        except KeyboardInterrupt:
            console.print(f"\nStopped. {_kept(Path(options.output_dir))} begins anew.", highlight=False)
            return INTERRUPTED
    return 0


def _kept(folder: Path) -> str:
    done = [stage for stage in STAGES if (folder / stage / "config.json").is_file()]
    return (
        f"In {folder} are the models of the steps that ended: {', '.join(done)}. `trl demo`" if done else "`trl demo`"
    )


def show(options: DemoArguments, console: Console) -> None:
    """Run the three steps, and show their results."""
    set_seed(options.seed)
    train, test = load_reviews("train"), load_reviews("test")
    prompts = prompt_openings(test.select(range(options.judged)))
    model, tokenizer = load(options.model_name_or_path, train["text"])
    named = options.reward_model_name_or_path
    classifier = named and ClassifierReward(named, positive_label=options.positive_label)

    temperature = recipes(options)["ppo"]["temperature"]
    write = partial(sample, tokenizer=tokenizer, temperature=temperature, seed=options.seed)

    with step(console, 1, "Supervised fine-tuning", f"{len(train):,} film reviews, positive and negative ones"):
        first = write(model, prompts=prompts[:1])
        fine_tune(model, tokenizer, train, test, options, console)
    before = write(model, prompts=prompts)
    possible = possible_endings(partial(write, model), prompts, options.seed)
    console.print(table_of_samples(prompts, {"before": first, "fine-tuned": before}, rows=1))

    if classifier:
        with step(console, 2, "Reward model", f"{named}: how much more likely its label {classifier.label_name!r} is"):
            reward: Reward = examine(classifier, test, console)
    else:
        with step(console, 2, "Reward model", COMPARED):
            reward = learn_rewards(model, tokenizer, train, test, options, console)

    with step(console, 3, "PPO", "towards reviews that the reward model likes, near the model of step 1"):
        reinforce(model, tokenizer, reward, prompt_openings(train), options, console)
    after = write(model, prompts=prompts)
    conclude(reward, prompts, before, after, possible, options, console)


def possible_endings(write: Callable[..., Sequence[str]], prompts: Sequence[str], seed: int) -> int | None:
    """The number of distinct last sentences in positive samples of the model, one per prompt, found by rejection
    sampling.

    A policy that had learned to be positive and nothing else would reach it. None if too few samples are positive.
    """
    positive: list[str] = []
    for attempt in range(1, TRIES + 1):
        positive += [text for text in write(prompts=prompts, seed=seed + attempt) if side_of(text) == "positive"]
        if len(positive) >= len(prompts):
            return count_endings(positive[: len(prompts)])
    return None


def conclude(
    reward: Reward,
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    possible: int | None,
    options: DemoArguments,
    console: Console,
) -> None:
    """Judge the samples before and after PPO; show the results in the terminal and on the report page of the last
    step."""
    console.print(table_of_samples(prompts, {"before PPO": before, "after PPO": after}, rows=options.samples))
    folder = Path(options.output_dir) / "ppo"
    endings = [continuations(prompts, texts) for texts in (before, after)]
    rewards = [list(reward(list(prompts), texts)) for texts in endings]
    rows = zip(prompts, *endings, *rewards, strict=True)
    (folder / COMPARISONS_FILE).write_text("".join(map(_comparison, rows)), encoding="utf-8")
    classifier = WordJudge(load_reviews("test"))
    verdicts = [judge(texts, given, classifier) for texts, given in zip((before, after), rewards, strict=True)]
    console.print(table_of_verdicts(verdicts[0], verdicts[1], possible))
    summary = sentence_about(verdicts[0], verdicts[1], len(prompts), possible)
    if isinstance(reward, RewardModel):
        summary += f" {LABELLED}"
    (folder / SUMMARY_FILE).write_text(summary + "\n", encoding="utf-8")
    console.print(summary, highlight=False)
    console.print(f"The report is in {write_report(folder)}, the models are beside it.", highlight=False)


def _comparison(row: tuple[str, str, str, float, float]) -> str:
    prompt, before, after, reward_before, reward_after = row
    sides = {
        "before": {"completion": before, "reward": reward_before},
        "after": {"completion": after, "reward": reward_after},
    }
    return json.dumps({"prompt": prompt, **sides}) + "\n"
