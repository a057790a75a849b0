"""Reward functions and the modules that they come from: what type checkers and editors read, and what is loaded on first use."""

from trl.rewards.answers import accuracy_reward as accuracy_reward
from trl.rewards.answers import get_cosine_scaled_reward as get_cosine_scaled_reward
from trl.rewards.answers import reasoning_accuracy_reward as reasoning_accuracy_reward
from trl.rewards.clip import get_aesthetic_reward as get_aesthetic_reward
from trl.rewards.clip import get_clip_reward as get_clip_reward
from trl.rewards.code import get_code_reward as get_code_reward
from trl.rewards.functions import boxed_format_reward as boxed_format_reward
from trl.rewards.functions import get_combined_reward as get_combined_reward
from trl.rewards.functions import get_json_reward as get_json_reward
from trl.rewards.functions import get_length_reward as get_length_reward
from trl.rewards.functions import get_regex_reward as get_regex_reward
from trl.rewards.functions import get_repetition_penalty_reward as get_repetition_penalty_reward
from trl.rewards.functions import get_soft_overlong_punishment as get_soft_overlong_punishment
from trl.rewards.functions import think_format_reward as think_format_reward
from trl.rewards.functions import think_tags_reward as think_tags_reward
from trl.rewards.human import human_preference as human_preference
from trl.rewards.human import human_rating as human_rating
from trl.rewards.images import brightness_reward as brightness_reward
from trl.rewards.images import get_color_reward as get_color_reward
from trl.rewards.images import get_hue_reward as get_hue_reward
from trl.rewards.images import jpeg_compressibility_reward as jpeg_compressibility_reward
from trl.rewards.images import jpeg_incompressibility_reward as jpeg_incompressibility_reward
