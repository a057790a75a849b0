"""Reward functions, by the names under which a trainer or the command line finds them."""

from trl.rewards.answers import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward
from trl.rewards.code import get_code_reward
from trl.rewards.functions import (
    boxed_format_reward,
    get_combined_reward,
    get_json_reward,
    get_length_reward,
    get_regex_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
    think_tags_reward,
)

__all__ = [
    "accuracy_reward",
    "boxed_format_reward",
    "get_code_reward",
    "get_combined_reward",
    "get_cosine_scaled_reward",
    "get_json_reward",
    "get_length_reward",
    "get_regex_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "think_tags_reward",
]
