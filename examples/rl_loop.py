"""GRPO as one visible loop, without a trainer: sample, reward, compute advantages within the group, update the policy.

    A_i = (r_i − mean r) / std r          loss = −min(ρ A, clip(ρ, 1 ± ε) A)          arXiv:2402.03300

A model of a few thousand weights learns to write the letter "a". On a CPU it takes seconds: python examples/rl_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl import LocalEngine, Prompt, SamplingParams, lay_out, score
from trl.algorithms.grpo import GRPO
from trl.models.layouts import choose_layout
from trl.ops.reduce import WEIGHTS
from trl.rollouts.experience import example_of, experience_of, with_signals
from trl.types import Example

LETTERS = "_abcdefghijklmnopqrstuvwxyz"  # a token is a letter; "_" ends a completion
PROMPTS = [Prompt([LETTERS.index(letter) for letter in word]) for word in ("the", "quick", "fox", "jumps")]


def reward(ids):
    """Fraction of the letters that are "a"."""
    return sum(LETTERS[i] == "a" for i in ids) / len(ids)


def main(steps=40, samples=8, length=12):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), eos_token_id=0, pad_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    engine, algorithm = LocalEngine(model, progress=False), GRPO()
    layout = choose_layout(
        model, "auto", multiple_completions=True
    )  # "shared": each prompt is processed once for its group
    curve = []
    for step in range(steps):
        # rollout: `samples` completions of every prompt, with their log-probabilities under the sampler
        engine.sync(model, step)
        rollouts = engine.generate(PROMPTS, SamplingParams(max_new_tokens=length, seed=step), samples)
        groups = [example_of(Example(p.ids, ()), each) for p, each in zip(PROMPTS, rollouts, strict=True)]
        # evaluation: a reward for each completion, and advantages relative to the group
        rewards = torch.tensor([reward(rollout.ids) for each in rollouts for rollout in each])
        experience = experience_of(groups, rewards)
        experience = experience.with_signals(old_logprobs=experience.signals["sampler_logprobs"])
        groups = with_signals(groups, algorithm.advantages(experience).signals)
        # optimisation: log-probabilities of the sampled tokens, the clipped surrogate, the mean over tokens
        batch = lay_out(groups, layout)
        loss, _ = algorithm.loss(score(model, batch, want={"entropy"}), batch)
        weight = WEIGHTS["token"](batch.mask)
        (loss * weight / weight.sum()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(rewards.mean().item())
        print(f"step {step:3}   reward {curve[-1]:.2f} {'█' * round(40 * curve[-1])}")
    return curve


if __name__ == "__main__":
    main()
