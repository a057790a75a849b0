"""Reward functions, by the names under which a trainer or the command line finds them."""

from trl.rewards.answers import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward
from trl.rewards.clip import AestheticReward as get_aesthetic_reward
from trl.rewards.clip import ClipReward as get_clip_reward
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
from trl.rewards.human import HumanPreference as human_preference
from trl.rewards.human import HumanRating as human_rating
from trl.rewards.images import (
    brightness_reward,
    get_color_reward,
    get_hue_reward,
    jpeg_compressibility_reward,
    jpeg_incompressibility_reward,
)

__all__ = [
    "accuracy_reward",
    "boxed_format_reward",
    "brightness_reward",
    "get_aesthetic_reward",
    "get_clip_reward",
    "get_code_reward",
    "get_color_reward",
    "get_combined_reward",
    "get_cosine_scaled_reward",
    "get_hue_reward",
    "get_json_reward",
    "get_length_reward",
    "get_regex_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "human_preference",
    "human_rating",
    "jpeg_compressibility_reward",
    "jpeg_incompressibility_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "think_tags_reward",
]
