"""Compatibility with scripts for other releases of TRL: what they ask for works, or an error says what to use instead.

from trl.trainer.utils import DataCollatorForCompletionOnlyLM       # works: the old path resolves to `trl`    names.py
from trl.experimental.cpo import CPOTrainer                         # works
from trl import BestOfNSampler                                      # ImportError with advice
SFTConfig(group_by_length=True)                                     # train_sampling_strategy="group_by_length"  options.py
PPOConfig(total_episodes=8)                                         # ConfigError with advice
class Mine(DPOTrainer): def dpo_loss(…)                             # ConfigError: this method is never called   hooks.py
class Mine(DPOTrainer): def _get_num_items_in_batch(…)              # ConfigError: nor is this one of `transformers.Trainer`
"""
