"""What to change where a device runs out of memory, in words, cheapest first."""

from __future__ import annotations

from trl.trainers.config import TrainerConfig


def remedies(args: TrainerConfig, *, positions: int, is_adapter: bool, keeps_activations: bool) -> str:
    """What is left to try in a run whose largest forward pass so far has so many `positions` (0: none has begun).

    `keeps_activations` says that there are layers that are not checkpointed.
    """
    less = f"max_tokens_per_micro_batch={positions // 2}" if positions else "max_tokens_per_micro_batch"
    found = [f"{less}: the same step in smaller forward passes"]
    if "num_generations" in vars(args):
        found.append("a smaller generation_batch_size: fewer keys and values while sampling")
    if args.cuda_graphs is not False and args.device.type == "cuda":
        found.append("cuda_graphs=False: gradients are given back between steps")
    if keeps_activations:
        found.append("gradient_checkpointing=True: all layers compute their activations again in backward")
    if not is_adapter and "8bit" not in str(args.optim):
        found.append("optim='adamw_8bit': a quarter of the optimizer's memory")
    if not is_adapter:
        found.append("peft_config=LoraConfig(): no gradients and no optimizer states of the model itself")
    return "What takes less memory, cheapest first:\n" + "\n".join(f"  {words}." for words in found)
