"""Group options under the headings of `--help`, and choose those that the short form shows."""

from __future__ import annotations

from collections.abc import Sequence

from trl.cli.fields import Option

_FIRST = """
    model_name_or_path dataset_name reward_funcs output_dir learning_rate num_train_epochs max_steps
    per_device_train_batch_size gradient_accumulation_steps num_generations max_length max_completion_length use_peft
    load_in_4bit eval_strategy logging_steps save_steps report_to resume
"""
FIRST, MOST_USED = 15, "Most used"
"""Number of options at the top of the help of a training command, and their heading."""

THEMES: dict[str, str] = {
    "Chat": """
        server server_timeout system_prompt user examples_path save_folder device
    """,
    "Data": """
        dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming dataset_columns
        dataset_rename datasets streaming test_split_size probabilities stopping_strategy
        dataset_text_field dataset_kwargs dataset_num_proc shuffle_dataset max_length max_prompt_length
        max_completion_length truncation_mode packing packing_strategy eval_packing padding_free pad_to_multiple_of
        chat_template_path chat_template_kwargs pad_token eos_token completion_only_loss assistant_only_loss
    """,
    "Model": """
        model_name_or_path model_revision dtype attn_implementation trust_remote_code model_init_kwargs disable_dropout
        adapter_name_or_path layout max_tokens_per_micro_batch use_liger_kernel liger_kernel_config use_cache
    """,
    "Adapters": """
        use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save
        lora_task_type use_rslora use_dora
    """,
    "Quantisation": """
        load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
        bnb_4bit_compute_dtype
    """,
    "Generation": """
        max_new_tokens min_new_tokens do_sample temperature top_k top_p min_p repetition_penalty stop stop_strings
        generation_kwargs
    """,
    "Rewards": """
        reward_funcs reward_model_name_or_path reward_weights multi_objective_aggregation reward_timeout on_reward_error
        ui
    """,
    "Method": "",
    "Optimisation": """
        learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
        lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm max_skipped_steps label_smoothing_factor
        neftune_noise_alpha seed data_seed full_determinism average_tokens_across_devices auto_find_batch_size
        train_sampling_strategy router_aux_loss_coef
    """,
    "Images": "max_pixels min_pixels image_folder image_features_mb adapted_part",
    "vLLM and servers": """
        use_vllm vllm_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
        vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size vllm_model_impl
        vllm_enable_sleep_mode vllm_structured_outputs_regex rollout_sync rollout_sync_dir rollout_request_timeout
    """,
    "Evaluation": """
        eval_strategy eval_steps eval_delay eval_on_start eval_samples eval_samples_max_new_tokens
        per_device_eval_batch_size eval_accumulation_steps
        load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only do_train do_eval
        do_predict eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics
    """,
    "Logging": """
        logging_steps logging_strategy logging_first_step logging_dir report_to run_name project disable_tqdm html_report
        log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo
        trackio_space_id trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen log_level
        log_level_replica log_on_each_node logging_nan_inf_filter skip_memory_metrics debug
    """,
    "Saving": """
        output_dir overwrite_output_dir resume save_strategy save_steps save_total_limit save_only_model resume_from_checkpoint
        save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint
        push_to_hub hub_model_id hub_private_repo hub_token hub_strategy hub_always_push hub_revision
    """,
    "Hardware": """
        num_processes accelerate_config dry_run
        bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
        activation_checkpointing_kwargs activation_offloading bf16_full_eval fp16_full_eval use_cpu deepspeed fsdp fsdp_config
        accelerator_config parallelism_config torch_compile torch_compile_backend torch_compile_mode cuda_graphs
        torch_empty_cache_steps dataloader_num_workers dataloader_drop_last dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
        ddp_backend ddp_timeout local_rank
    """,
    "Other": "",
}
"""Headings and their options, both in the order in which they are shown."""

_COMMON = """
    learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type
    warmup_steps optim weight_decay max_grad_norm seed
    eval_strategy eval_steps per_device_eval_batch_size load_best_model_at_end
    logging_steps report_to run_name
    output_dir save_strategy save_steps save_total_limit resume_from_checkpoint push_to_hub hub_model_id
    bf16 fp16 gradient_checkpointing use_cpu deepspeed fsdp torch_compile
"""
COMMON = frozenset(_COMMON.split())
"""Options of `transformers.TrainingArguments` that the short help shows."""

_RARE = """
    exp_name log_with task_name model_name query_dataset reward_model tracker_kwargs accelerator_kwargs project_kwargs
    tracker_project_name push_to_hub_if_best_kwargs compare_steps steps forward_batch_size optimize_device_cache
    remove_unused_columns
"""
RARE = frozenset(_RARE.split())
"""Options of trl's own classes that the short help does not show: those that only scripts of the classic PPO loop use."""

_PLACE = {name: (title, i) for title, names in THEMES.items() for i, name in enumerate(names.split())}


def by_theme(options: Sequence[Option]) -> dict[str, list[Option]]:
    """Group options by heading, in the order shown: a tool's own options, the most used of a training command, the others.

    An option that no theme lists is shown under "Other" if `transformers` declares it, under "Method" if a trainer
    does, and under the name of its class otherwise. Those of a derived class come before those of its bases.
    """
    names = {option.name for option in options}
    first = [name for name in _FIRST.split() if name in names][:FIRST] if "learning_rate" in names else []
    top = {name: (MOST_USED, i) for i, name in enumerate(first)}
    last = {option.owner: i for i, option in enumerate(options)}
    places = {o.name: top.get(o.name) or _PLACE.get(o.name, (_home(o), -last[o.owner])) for o in options}
    own = [title for title, _ in places.values() if title not in THEMES]
    titles = dict.fromkeys([*own, MOST_USED, *THEMES])
    grouped = {
        title: sorted((o for o in options if places[o.name][0] == title), key=lambda o: places[o.name][1])
        for title in titles
    }
    return {title: group for title, group in grouped.items() if group}


def _home(option: Option) -> str:
    if option.owner == "TrainingArguments":
        return "Other"
    return "Method" if option.owner.endswith(("Config", "Options")) else option.owner.removesuffix("Arguments")


def is_common(option: Option) -> bool:
    """True if the short help shows the option."""
    if option.help.startswith(("Not available", "Not needed")):
        return False
    return option.name in COMMON or (option.owner != "TrainingArguments" and option.name not in RARE)
