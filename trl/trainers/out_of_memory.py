"""Advice for a run that ran out of memory: which options reduce it, cheapest first."""

from __future__ import annotations

from trl.trainers.config import TrainerConfig


def remedies(args: TrainerConfig, *, positions: int, is_adapter: bool, keeps_activations: bool) -> str:
    """The options that a run has not used yet. Its largest forward pass so far has `positions` positions (0 before the first).

    `keeps_activations` says that some layers are not checkpointed.
    """
    less = f"max_tokens_per_micro_batch={positions // 2}" if positions else "max_tokens_per_micro_batch"
    found = [f"{less}: the same step in smaller forward passes"]
    if "num_generations" in vars(args):
        found += _for_sampling(args)
    if args.cuda_graphs is not False and args.device.type == "cuda":
        found.append("cuda_graphs=False: gradients are freed between steps")
    if keeps_activations:
        found.append("gradient_checkpointing=True: all layers recompute their activations in backward")
    if not is_adapter and "8bit" not in str(args.optim):
        found.append("optim='adamw_8bit': a quarter of the optimizer's memory")
    if not is_adapter:
        found.append("peft_config=LoraConfig(): no gradients and no optimizer states of the model itself")
    return "To reduce memory, cheapest first:\n" + "\n".join(f"  {words}." for words in found)


def _for_sampling(args: TrainerConfig) -> list[str]:
    """Remedies for the memory of whatever samples on this device."""
    options = vars(args)
    if not options.get("use_vllm"):
        return ["a smaller generation_batch_size: a smaller KV cache while sampling"]
    if options["vllm_mode"] == "server":
        return []
    found = [
        f"vllm_gpu_memory_utilization below {options['vllm_gpu_memory_utilization']:g}: a smaller KV cache of vLLM"
    ]
    if not options["vllm_enable_sleep_mode"]:
        found.insert(0, "vllm_enable_sleep_mode=True: vLLM leaves the device to training between rollout batches")
    return found
