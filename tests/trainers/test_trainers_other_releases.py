"""What scripts for other releases of TRL give to trainers and ask of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import trl
from tests.conftest import WIDTHS, make_tokenizer
from tests.trainers.online_support import letters, prompts
from trl import (
    CPOConfig,
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    ModelConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardTrainer,
    RLOOTrainer,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    SyncRefModelCallback,
    TrlParser,
)
from trl.cli.fields import options_in_source
from trl.cli.parser import OptionParser
from trl.data.examples import TokenizedRow, examples_from
from trl.errors import ConfigError, DataError, MissingPackageError
from trl.trainers.heaviest import row_positions
from trl.trainers.kto import mismatched
from trl.trainers.options import resolve_args
from trl.trainers.sft import formatted

TEXTS = Dataset.from_dict({"text": ["A fox.", "It runs far.", "No.", "It is late now."] * 2})
PAIRS = Dataset.from_dict({"prompt": ["Why", "How"] * 4, "chosen": [" so", " it is"] * 4, "rejected": [" no"] * 8})
LABELLED = Dataset.from_dict(
    {
        "prompt": [f"Why {i} " * (i % 3 + 1) for i in range(8)],
        "completion": [f"so {i * 7}" for i in range(8)],
        "label": [True, False] * 4,
    }
)


def made(trainer, model, rows, folder, *, given=None, **options):
    fixed = {"save_strategy": "no", "disable_tqdm": True, "html_report": False, "report_to": [], "bf16": False}
    sizes = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    args = trainer.config_class(output_dir=str(folder), **{**fixed, **sizes, **options})
    return trainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **(given or {}))


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**WIDTHS, num_labels=1)).eval()


# ---- evaluation ----


class TwicePlusOne(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * found[0] + 1, found[1]) if return_outputs else 2 * found + 1


@pytest.mark.parametrize("size", [1, 3])
def test_an_evaluation_asks_a_compute_loss_of_ones_own(make_model, tmp_path, size):
    found = {}
    for trainer in (SFTTrainer, TwicePlusOne):
        options = {"per_device_eval_batch_size": size}
        run = made(trainer, make_model("llama"), TEXTS, tmp_path, given={"eval_dataset": TEXTS}, **options)
        found[trainer] = run.evaluate()
        assert not run.meters["train"].read(lambda row: row, torch.device("cpu"))
    plain, own = found[SFTTrainer], found[TwicePlusOne]
    assert own["eval_loss"] == pytest.approx(2 * plain["eval_loss"] + 1, rel=1e-6)
    assert own["eval_entropy"] == pytest.approx(plain["eval_entropy"])


def test_an_evaluation_asks_a_compute_loss_that_a_script_set(make_model, tmp_path):
    run = made(SFTTrainer, make_model("llama"), TEXTS, tmp_path, given={"eval_dataset": TEXTS})
    plain, before = run.compute_loss, run.evaluate()["eval_loss"]

    def doubled(model, inputs, return_outputs=False, **_):
        loss, metrics = plain(model, inputs, return_outputs=True)
        return (2 * loss, metrics) if return_outputs else 2 * loss

    run.compute_loss = doubled
    assert run.evaluate()["eval_loss"] == pytest.approx(2 * before, rel=1e-6)


def test_a_compute_loss_that_gives_no_metrics_is_named(make_model, tmp_path):
    class Alone(SFTTrainer):
        def compute_loss(self, model, inputs, **_):
            return super().compute_loss(model, inputs)

    with pytest.raises(ConfigError, match=r"Alone\.compute_loss was called with return_outputs=True"):
        made(Alone, make_model("llama"), TEXTS, tmp_path).evaluate(TEXTS)


def test_predictions_come_in_the_order_of_the_rows(tmp_path):
    rows = Dataset.from_dict(
        {"prompt": ["Why"] * 6, "chosen": [" so" * 9 ** (i % 4) for i in range(6)], "rejected": [" no"] * 6}
    )
    runs = [
        made(RewardTrainer, classifier(), rows, tmp_path, per_device_eval_batch_size=size, max_length=None)
        for size in (1, 6)
    ]
    one, all_at_once = (run.predict(run.train_dataset).predictions for run in runs)
    assert one.shape == (6, 2)
    assert len(np.unique(one[:, 0])) == 4
    assert all_at_once == pytest.approx(one, abs=1e-5)


def test_predict_gives_logits_of_a_language_model(make_model, tmp_path):
    run = made(SFTTrainer, make_model("llama"), TEXTS, tmp_path)
    found = run.predict(run.train_dataset)
    assert found.predictions.shape[:2] == found.label_ids.shape
    assert run.evaluate(run.train_dataset)["eval_loss"] == pytest.approx(found.metrics["test_loss"])


# ---- rows ----


def answer(text):
    return {"role": "assistant", "content": text}


def test_conversations_without_a_message_in_common_are_a_pair_of_a_reward_model(make_model, tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    rows = Dataset.from_list(
        [
            {"chosen": [answer("good")], "rejected": [answer("bad")]},
            {"chosen": [*asked, answer("good")], "rejected": [*asked, answer("bad")]},
        ]
    )
    run = made(RewardTrainer, classifier(), rows, tmp_path)
    tokenizer = run.processing_class
    for row, given in zip(run.train_dataset, rows, strict=True):
        for name, ids in zip(("chosen", "rejected"), row["completion_ids"], strict=True):
            whole = tokenizer.apply_chat_template(given[name], return_dict=False)
            assert row["prompt_ids"] + ids == whole
    with pytest.raises(DataError, match=r"Row 1, column 'chosen': there is no prompt"):
        made(DPOTrainer, make_model("llama"), rows, tmp_path)


def test_a_pair_whose_prompt_was_cut_is_learned_from(make_model, tmp_path):
    run = made(DPOTrainer, make_model("llama"), PAIRS, tmp_path, max_length=4, truncation_mode="keep_end")
    assert [] in run.train_dataset["prompt_ids"][:]
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def labelled_collator():
    return DataCollatorForSeq2Seq(make_tokenizer())


def test_what_a_collator_gives_besides_tokens_is_said_once(caplog):
    def collate(rows):
        return {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]]), "weight": torch.ones(1)}

    to_examples = examples_from(collate)
    for _ in range(2):
        assert [example.completions[0].ids for example in to_examples([{"input_ids": [5, 6]}])] == [[5, 6]]
    (record,) = caplog.records
    assert "weight" in record.message


@pytest.mark.parametrize("collator", [labelled_collator, DataCollatorWithFlattening])
@pytest.mark.parametrize("rows", [TEXTS, PAIRS.rename_columns({"chosen": "completion"}).remove_columns("rejected")])
def test_collators_are_told_what_is_trained_on(make_model, tmp_path, rows, collator):
    found = [
        made(SFTTrainer, make_model("llama"), rows, tmp_path, given=given).evaluate(rows)["eval_loss"]
        for given in ({}, {"data_collator": collator()})
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


# ---- trainers ----


def test_a_list_goes_to_a_collator_as_a_dataset_does(make_model, tmp_path):
    """A row of a list may be of any type; evaluation sets may be lists, too."""
    tokenizer = make_tokenizer()

    def collate(rows):
        texts = [row["text"] if isinstance(row, dict) else row[0] for row in rows]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def losses(train, evaluation):
        given = {"data_collator": collate, "eval_dataset": evaluation}
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "eval_strategy": "steps", "eval_steps": 1}
        run = made(SFTTrainer, make_model("llama"), train, tmp_path, given=given, overwrite_output_dir=True, **options)
        run.train()
        return [entry.get("loss", entry.get("eval_a_loss")) for entry in run.state.log_history]

    listed = [[text] for text in TEXTS["text"]]
    assert losses(listed, {"a": listed[:3]}) == losses(TEXTS, {"a": TEXTS.select(range(3))})


def test_a_list_needs_a_collator(make_model, tmp_path):
    with pytest.raises(ConfigError, match="train_dataset has to be a Dataset"):
        made(SFTTrainer, make_model("llama"), list(TEXTS), tmp_path, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_completion_under_another_prompt_has_no_number_of_its_own(make_model, tmp_path):
    """Before the first step policy is reference, so h = 0 under every prompt."""
    run = made(KTOTrainer, make_model("llama"), LABELLED, tmp_path, precompute_ref_log_probs=True)
    examples = mismatched(run.to_examples(list(run.train_dataset)))
    found = run._logratio(run.collate(examples).to(run.args.device))
    assert found.tolist() == pytest.approx([0.0] * 8, abs=1e-5)


def test_a_callback_that_moves_the_reference_takes_an_accelerator(make_model, tmp_path):
    run = made(DPOTrainer, make_model("llama"), PAIRS, tmp_path, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    before = [parameter.clone() for parameter in run.ref_model.parameters()]
    run.add_callback(SyncRefModelCallback(ref_model=run.ref_model, accelerator=run.accelerator))
    run.train()
    assert any(not torch.equal(*pair) for pair in zip(before, run.ref_model.parameters(), strict=True))


def grpo(model, folder, **options):
    sizes = {"num_generations": 2, "max_completion_length": 4, **options}
    return made(GRPOTrainer, model, prompts(), folder, given={"reward_funcs": letters}, **sizes)


def test_completions_of_a_least_length(make_model, tmp_path):
    run = grpo(make_model("llama"), tmp_path, generation_kwargs={"min_new_tokens": 3})
    run.train()
    assert run.state.log_history[0]["completions/min_length"] >= 3


def test_an_online_trainer_takes_neither_collator_nor_ref_model(make_model, tmp_path):
    def run(**given):
        rows, given = prompts(), {"reward_funcs": letters, **given}
        return made(GRPOTrainer, make_model("llama"), rows, tmp_path, given=given, num_generations=2)

    run(data_collator=None, ref_model=None)
    with pytest.raises(ConfigError, match="leave `data_collator` out"):
        run(data_collator=list)
    with pytest.raises(
        ConfigError, match="GRPOTrainer has no argument 'ref_model'. Online trainers take it as `reference`"
    ):
        run(ref_model=make_model("llama"))


def test_an_online_trainer_has_its_reference(make_model, tmp_path):
    assert grpo(make_model("llama"), tmp_path).ref_model is None
    run = grpo(make_model("llama"), tmp_path, beta=0.1)
    assert run.ref_model is run.reference.model


def test_options_and_rewards_are_read_from_an_online_trainer(make_model, tmp_path):
    run = grpo(make_model("llama"), tmp_path, beta=0.1, temperature=0.7)
    assert (run.beta, run.temperature, run.num_generations, run.num_generations_eval) == (0.1, 0.7, 2, 2)
    assert (run.reward_funcs, run.reward_func_names) == ([letters], ["letters"])
    assert run.reward_weights.tolist() == [1.0]
    assert (run.epsilon_low, run.epsilon_high, run.max_prompt_length) == (0.2, 0.2, None)


def test_an_option_is_not_set_on_a_trainer_but_to_what_it_is(make_model, tmp_path):
    run = grpo(make_model("llama"), tmp_path, beta=0.1)
    run.beta, run.num_generations_eval, run.epsilon_high = 0.1, 2, 0.2
    for name, option in (("beta", "beta"), ("epsilon_low", "epsilon"), ("epsilon_high", "epsilon_high")):
        with pytest.raises(ConfigError, match=rf"GRPOTrainer\.{name} cannot be set.* Set {option}=0\.5 in GRPOConfig"):
            setattr(run, name, 0.5)
    with pytest.raises(ConfigError, match=r"GRPOTrainer\.ref_model cannot be set"):
        run.ref_model = make_model("llama")


def test_an_attribute_that_is_no_option_of_a_configuration_belongs_to_the_subclass(make_model, tmp_path):
    options = {"num_generations": 2, "max_completion_length": 4}
    run = made(RLOOTrainer, make_model("llama"), prompts(), tmp_path, given={"reward_funcs": letters}, **options)
    with pytest.raises(AttributeError, match="RLOOTrainer has no attribute 'top_entropy_quantile'"):
        _ = run.top_entropy_quantile
    run.top_entropy_quantile = 0.3
    assert run.top_entropy_quantile == 0.3


def test_other_reward_functions_reward_what_follows(make_model, tmp_path):
    def nothing(completions, **_):
        return [0.25] * len(completions)

    run = grpo(make_model("llama"), tmp_path, reward_weights=[2.0])
    run.reward_funcs = [nothing]
    run.train()
    assert run.state.log_history[0]["rewards/nothing/mean"] == 0.25
    assert run.state.log_history[0]["reward"] == 0.5
    run.reward_funcs, run.reward_weights = [nothing, letters], [1.0, 0.0]
    run.reward_func_names = ["a", "b"]
    assert (run.reward_weights.tolist(), run.reward_func_names) == ([1.0, 0.0], ["a", "b"])
    with pytest.raises(ConfigError, match="1 weights were given for 2 reward functions"):
        run.reward_weights = [1.0]


def test_what_no_online_trainer_reads_is_not_set(make_model, tmp_path):
    run = grpo(make_model("llama"), tmp_path)
    with pytest.raises(
        ConfigError, match=r"GRPOTrainer\.generation_config cannot be set: nothing would read it.*`top_p`"
    ):
        run.generation_config = run.model.generation_config
    with pytest.raises(AttributeError, match=r"no attribute 'llm'.*trainer\.engine"):
        _ = run.llm
    assert not hasattr(run, "vllm_client")


def test_a_rollout_function_is_set_after_construction(make_model, tmp_path):
    def fixed(prompts, trainer):
        ids = {"prompt_ids": [[3, 4]] * len(prompts), "completion_ids": [[5 + i] for i in range(len(prompts))]}
        return {**ids, "logprobs": [[-1.0]] * len(prompts)}

    run = grpo(make_model("llama"), tmp_path)
    assert run.rollout_func is None
    run.rollout_func = fixed
    run.train()
    assert run.rollout_func is fixed
    assert run.state.log_history[0]["completions/mean_length"] == 1


def test_a_curriculum_in_a_callback_is_told_that_it_has_no_effect(make_model, tmp_path, caplog):
    class Curriculum(TrainerCallback):
        def on_step_end(self, *_, **__):
            run.train_dataset = run.train_dataset.select([0])

    run = grpo(make_model("llama"), tmp_path)
    run.add_callback(Curriculum)
    run.train()
    assert "train_dataset was replaced during training, which goes on with the rows that it began with" in caplog.text


def test_completions_are_shown_on_request(make_model, tmp_path, capsys):
    run = grpo(make_model("llama"), tmp_path)
    run.eval_dataset = run.train_dataset.select(range(2))
    run.generate_completions()
    assert not run.args.log_completions
    assert "Say" in capsys.readouterr().out
    assert (tmp_path / "completions" / "eval").is_dir()


# ---- options ----


CONFIGS = [getattr(trl, name) for name in trl.__all__ if name.endswith(("Config", "Arguments"))]


@pytest.mark.parametrize(
    "config", [each for each in CONFIGS if each is not trl.DatasetConfig]
)  # one entry of a mixture
def test_three_parsers_read_a_configuration_alike(tmp_path, config):
    words = ["--seed", "7"] if "seed" in config.__dataclass_fields__ else []
    if issubclass(config, TrainingArguments):
        words += ["--output_dir", str(tmp_path), "--report_to", "none", "--learning_rate", "1e-5"]
    (made,) = HfArgumentParser(config).parse_args_into_dataclasses(words)
    assert made == TrlParser(config).parse_args_and_config(words)[0]
    assert made == OptionParser(options_in_source(f"{config.__module__}:{config.__name__}")).parse(words).arguments_for(
        config
    )


@pytest.mark.parametrize("config", [each for each in CONFIGS if issubclass(each, TrainingArguments)])
def test_a_parser_of_transformers_reads_a_script_and_its_model(tmp_path, config):
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--dataset_name", "imdb", "--lora_r", "3"]
    parser = HfArgumentParser((ScriptArguments, config, ModelConfig))
    script, training, model = parser.parse_args_into_dataclasses(words)
    assert (script.dataset_name, training.output_dir, model.lora_r) == ("imdb", str(tmp_path), 3)


@pytest.mark.parametrize(
    ("config", "option", "words", "values"),
    [
        (OnlineDPOConfig, "beta", ["0.2", "0.1"], [0.2, 0.1]),
        (OnlineDPOConfig, "beta", ["0.2"], [0.2]),
        (DPOConfig, "loss_type", ["ipo", "sft"], ["ipo", "sft"]),
    ],
)
def test_a_parser_of_transformers_reads_one_or_several(tmp_path, config, option, words, values):
    words = ["--output_dir", str(tmp_path), "--report_to", "none", f"--{option}", *words]
    (made,) = HfArgumentParser(config).parse_args_into_dataclasses(words)
    assert getattr(made, option) == values


@pytest.mark.parametrize("beta", ["0.1", [0.1, "0.2"], []])
def test_a_beta_is_a_number_or_several(tmp_path, beta):
    with pytest.raises(ConfigError, match=r"beta.*is (text|an empty list): give a"):
        OnlineDPOConfig(output_dir=str(tmp_path), report_to=[], beta=beta)


def test_a_script_for_ppo_has_options_of_its_own(tmp_path):
    """As classic scripts had them, whose configuration had none of this name."""
    script = dataclasses.make_dataclass("Script", [("trust_remote_code", bool, False), ("use_peft", bool, False)])
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--trust_remote_code", "--batch_size", "4"]
    own, training = HfArgumentParser((script, PPOConfig)).parse_args_into_dataclasses(words)
    assert (own.trust_remote_code, training.trust_remote_code, training.batch_size) == (True, False, 4)
    given = PPOConfig(output_dir=str(tmp_path), report_to=[], trust_remote_code=True)
    assert dataclasses.replace(given, seed=1).trust_remote_code


def test_an_option_of_two_classes_reaches_both(tmp_path):
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--trust_remote_code"]
    found = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config(words)
    assert [one.trust_remote_code for one in found] == [True, True]
    assert TrlParser(ModelConfig).parse_args_and_config(["--trust_remote_code"])[0].trust_remote_code
    assert not ModelConfig().trust_remote_code


def test_older_names_of_what_is_no_trainer():
    assert ScriptArguments(ignore_bias_buffers=True) == ScriptArguments()
    assert not ScriptArguments().ignore_bias_buffers
    assert ModelConfig(torch_dtype="bfloat16").dtype == "bfloat16"
    (parsed,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(["--torch_dtype", "bfloat16"])
    assert parsed.torch_dtype == "bfloat16"
    with pytest.raises(MissingPackageError, match="attn_implementation='flash_attention_2'"):
        ModelConfig(use_flash_attention_2=True)


@pytest.mark.parametrize(("trainer", "rows"), [(DPOTrainer, PAIRS), (KTOTrainer, LABELLED)])
def test_an_adapter_learns_against_a_reference_of_its_own(make_model, tmp_path, caplog, trainer, rows):
    """The rewards are those against the given reference, which is another model here."""
    other, options = (
        make_model("llama", seed=1),
        {"peft_config": LoraConfig(r=2), "ref_model": make_model("llama", seed=1)},
    )
    found = made(trainer, make_model("llama"), rows, tmp_path, given=options, max_steps=1)
    assert "ref_model was given together with peft_config" in caplog.text
    found.train()
    whole = made(
        trainer, make_model("llama"), rows, tmp_path, given={"ref_model": other}, max_steps=1, overwrite_output_dir=True
    )
    whole.train()
    first, second = (run.state.log_history[0]["rewards/chosen"] for run in (found, whole))
    assert first == pytest.approx(second, rel=1e-4)
    assert first != pytest.approx(0, abs=1e-3)


def test_options_are_read_and_set_by_older_names(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], max_seq_length=8)
    args.max_seq_length *= 2
    assert (args.max_length, copy.deepcopy(args).max_seq_length) == (16, 16)
    model = ModelConfig()
    model.torch_dtype = "bfloat16"
    assert model.dtype == "bfloat16"
    assert (
        PPOConfig(output_dir=str(tmp_path), report_to=[], steps=9, batch_size=4, mini_batch_size=4).total_ppo_epochs
        == 3
    )
    with pytest.raises(ConfigError, match="has no argument 'torch_dtype'. Give it in `model_init_kwargs`"):
        SFTTrainer("x", args, torch_dtype="bfloat16")
    with pytest.raises(AttributeError, match="chars_per_token has no value"):
        args.chars_per_token  # noqa: B018
    with pytest.raises(AttributeError, match="SFTConfig has no option 'sft_model_path'. Give the trainer `model`"):
        args.sft_model_path  # noqa: B018
    with pytest.raises(ConfigError, match="DPOConfig has no option 'generate_during_eval'. `log_completions`"):
        DPOConfig(output_dir=str(tmp_path), report_to=[]).generate_during_eval = True


@pytest.mark.parametrize("config", CONFIGS)
def test_names_that_no_configuration_has(config):
    with pytest.raises(ConfigError, match=rf"{config.__name__} has no option 'sede'"):
        config(sede=1)


def test_options_elsewhere_may_be_off(tmp_path):
    given = {"output_dir": str(tmp_path), "report_to": []}
    assert not hasattr(
        CPOConfig(**given, max_completion_length=None, generate_during_eval=False), "max_completion_length"
    )
    with pytest.raises(ConfigError, match=r"CPOConfig has no option 'generate_during_eval'\. `log_completions`"):
        CPOConfig(**given, generate_during_eval=True)


@pytest.mark.parametrize(("option", "value"), [("use_ipex", False), ("fp16_backend", "auto"), ("use_mps_device", True)])
def test_options_of_earlier_transformers_may_be_off(tmp_path, option, value):
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], **{option: value})
    assert not hasattr(args, option)


@pytest.mark.parametrize(
    ("option", "value", "now"),
    [("adafactor", True, "optim='adafactor'"), ("fp16_backend", "apex", "leave it out")],
)
def test_options_of_earlier_transformers_say_what_to_do(tmp_path, option, value, now):
    with pytest.raises(ConfigError, match=rf"SFTConfig has no option '{option}'\. .*{now}"):
        SFTConfig(output_dir=str(tmp_path), report_to=[], **{option: value})


@pytest.mark.parametrize(("name", "now"), [("policy", "Use `model`"), ("config", "Use `args`")])
def test_arguments_of_an_earlier_online_trainer_say_what_to_do(name, now):
    with pytest.raises(ConfigError, match=f"RLOOTrainer has no argument '{name}'. {now}"):
        RLOOTrainer(**{name: "gpt2"})


def test_an_option_without_effect_is_no_suggestion(tmp_path):
    with pytest.raises(ConfigError) as refused:
        SFTConfig(output_dir=str(tmp_path), use_mps_devices=True)
    assert "Did you mean" not in str(refused.value)


def test_a_configuration_is_extended_by_options_of_ones_own(tmp_path):
    @dataclasses.dataclass
    class Mine(DPOConfig):
        margin: float = 0.5

    args = Mine(output_dir=str(tmp_path), report_to=[], max_length=8)
    assert (args.margin, args.max_length) == (0.5, 8)
    assert "margin: float = 0.5" in Mine.__doc__.splitlines()


@pytest.mark.parametrize("trainer", [SFTTrainer, GRPOTrainer])
def test_rows_that_replace_those_of_a_trainer_are_encoded(make_model, tmp_path, trainer):
    online = trainer is GRPOTrainer
    rows = prompts(4) if online else TEXTS
    given = {"reward_funcs": letters} if online else {}
    options = {"num_generations": 2, "max_completion_length": 2} if online else {}
    run = made(trainer, make_model("llama"), rows, tmp_path, given=given, **options)
    run.train_dataset = rows
    with pytest.raises(DataError, match="not encoded"):
        run.train()
    with pytest.raises(DataError, match="not encoded"):  # on a GPU, lengths are read before the first step
        row_positions(rows)


def test_the_loss_in_chunks_is_the_loss(make_model, tmp_path):
    found = [
        made(SFTTrainer, make_model("llama"), TEXTS, tmp_path, loss_type=name, given={"eval_dataset": TEXTS}).evaluate()
        for name in ("nll", "chunked_nll")
    ]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]


# ---- what scripts ask before they call, and read from batches ----


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer, GRPOTrainer, trl.PPOTrainer])
def test_a_signature_lists_the_arguments(trainer):
    listed = inspect.signature(trainer.__init__).parameters
    assert {"peft_config", "callbacks", "optimizers", "processing_class", "args", "keywords"} <= listed.keys()
    assert not {"max_seq_length", "dataset_text_field", "packing"} & listed.keys()


def test_a_trainer_of_ones_own_has_the_signature_that_it_says():
    class Mine(SFTTrainer):
        def __init__(self, alpha, **others):
            super().__init__(**others)

    assert list(inspect.signature(Mine).parameters) == ["alpha", "others"]


def test_options_that_a_script_adds_to_plain_arguments_count(tmp_path):
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        max_seq_length: int = 9
        packing: bool = None
        cache_dir: str = "x"

    args = Mine(output_dir=str(tmp_path), report_to=[], bf16=False)
    args.truncation_mode = "keep_end"
    found = resolve_args(SFTConfig, args, {}, trainer="SFTTrainer")
    assert (found.max_length, found.truncation_mode, found.packing) == (9, "keep_end", False)
    assert resolve_args(SFTConfig, args, {"max_seq_length": 7}, trainer="SFTTrainer").max_length == 7


READS = {
    "an item": lambda batch: batch["labels"],
    "get": lambda batch: batch.get("labels"),
    "items": lambda batch: {name: value.cpu() for name, value in batch.items()},
    "keywords": lambda batch: dict(**batch),
    "pop": lambda batch: batch.pop("labels"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_batch_says_that_it_is_no_dict(make_model, tmp_path, read):
    run = made(SFTTrainer, make_model("llama"), TEXTS, tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    slots = run.micro_batches(batch)
    rows = next(iter(run.get_eval_dataloader(run.train_dataset)))
    for given, words in (
        (batch, "preview"),
        (slots[0], "micro-batches"),
        (slots[0][0], "trl.Batch"),
        (rows, "RowItems"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(given)


def test_a_batch_takes_no_items(make_model, tmp_path):
    run = made(SFTTrainer, make_model("llama"), TEXTS, tmp_path)
    batch = run.collate(run.data_collator(list(run.train_dataset)))
    with pytest.raises(ConfigError, match=r"trl\.Batch"):
        batch["use_cache"] = False
    with pytest.raises(ConfigError, match=r"trl\.Batch"):
        _ = "labels" in batch


def test_outputs_that_a_compute_loss_does_not_return_are_named(make_model, tmp_path):
    run = made(SFTTrainer, make_model("llama"), TEXTS, tmp_path)
    ((batch,),) = run.micro_batches(run.data_collator(list(run.train_dataset)))
    _, found = run.compute_loss(run.model, batch.to(run.args.device), return_outputs=True)
    with pytest.raises(AttributeError, match=r"'entropy', .*'logits' is not among them"):
        _ = found.logits
    with pytest.raises(ConfigError, match="'logits' is not among them"):
        _ = found["logits"]


@pytest.mark.parametrize(("trainer", "rows"), [(DPOTrainer, PAIRS), (KTOTrainer, LABELLED)])
def test_a_collator_of_tokens_is_not_for_pairs_or_labels(make_model, tmp_path, trainer, rows):
    given = {"data_collator": DataCollatorForSeq2Seq(make_tokenizer())}
    with pytest.raises(ConfigError, match="A data_collator makes batches of tokens"):
        made(trainer, make_model("llama"), rows, tmp_path, given=given).train()


class Masking(DataCollatorForSeq2Seq):
    def __call__(self, *arguments, **others):
        return super().__call__(*arguments, **others)


def test_a_collator_of_an_encoder_decoder_is_padding_alone(make_model, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 4]], "labels": [[7, 2], [9, 2]]})
    found = {}
    for name, collator in {"none": None, "padding": DataCollatorForSeq2Seq(make_tokenizer())}.items():
        run = made(SFTTrainer, make_model("t5"), rows, tmp_path, given={"data_collator": collator})
        found[name] = run.data_collator(list(run.train_dataset))
    assert found["none"] == found["padding"]
    assert found["none"][0].prompt == [5, 6, 7]
    with pytest.raises(ConfigError, match="data_collator is a function, but batches for an encoder-decoder"):
        made(SFTTrainer, make_model("t5"), rows, tmp_path, given={"data_collator": lambda rows: rows})
    with pytest.raises(ConfigError, match="data_collator is a Masking, but batches for an encoder-decoder"):
        made(SFTTrainer, make_model("t5"), rows, tmp_path, given={"data_collator": Masking(make_tokenizer())})


def stacked(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("skipped", [{}, {"dataset_kwargs": {"skip_prepare_dataset": True}}])
def test_a_collator_may_read_what_the_rows_of_token_ids_have(make_model, tmp_path, skipped):
    ids = [[5, 6, 7, 2], [8, 9, 4, 2]]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 4] * 2, "labels": ids})
    run = made(SFTTrainer, make_model("llama"), rows, tmp_path, given={"data_collator": stacked}, **skipped)
    assert [example.completions[0].ids for example in run.data_collator(list(run.train_dataset))] == ids
    with pytest.raises(KeyError):
        TokenizedRow(input_ids=ids[0])["completion_mask"]


def test_options_of_offline_trainers_are_read_and_not_set(make_model, tmp_path):
    run = made(DPOTrainer, make_model("llama"), PAIRS, tmp_path, max_length=64)
    assert (run.beta, run.max_length, hasattr(run, "packing")) == (0.1, 64, False)
    run.beta = 0.1
    with pytest.raises(ConfigError, match=r"DPOTrainer\.beta cannot be set.*Set beta=5\.0 in DPOConfig"):
        run.beta = 5.0
    with pytest.raises(AttributeError, match=r"DPOTrainer\._metrics is of another release"):
        run._metrics["train"]["loss"].append(1.0)


class OwnComputeLoss(DPOTrainer):
    def compute_loss(self, *arguments, **others):
        return super().compute_loss(*arguments, **others)


class OwnLoss(DPOTrainer):
    def loss(self, model, batch):
        return super().loss(model, batch)


@pytest.mark.parametrize("trainer", [OwnLoss, OwnComputeLoss, DPOTrainer])
def test_a_trainer_with_a_loss_of_its_own_has_options_and_a_reference_of_its_own(make_model, tmp_path, trainer):
    run = made(trainer, make_model("llama"), PAIRS, tmp_path)
    if trainer is DPOTrainer:
        run.compute_loss = functools.partial(run.compute_loss)
    run.beta, run.ref_model = 7.0, torch.nn.Identity()
    assert (run.beta, type(run.ref_model)) == (7.0, torch.nn.Identity)


def test_constructors_of_scripts_may_have_any_signature(make_model, tmp_path):
    class Partial(SFTTrainer):
        __init__ = functools.partialmethod(SFTTrainer.__init__, processing_class=make_tokenizer())

    class Typed(SFTTrainer):
        def __init__(self, *arguments, **others: Unpack[OfScripts]):  # noqa: F821
            super().__init__(*arguments, **others)

    for trainer in (Partial, Typed):
        args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
        given = {} if trainer is Partial else {"processing_class": make_tokenizer()}
        assert trainer(make_model("llama"), args, train_dataset=TEXTS, **given).train_dataset


FORMATS = {
    "a text of a row": lambda row: f"Q: {row['text']}",
    "a text of a row in a list": lambda row: [f"Q: {row['text']}"],
    "texts of a batch": lambda batch: [f"Q: {text}" for text in batch["text"]],
    "texts by number": lambda batch: [f"Q: {batch['text'][i]}" for i in range(len(batch["text"]))],
    "a list that fails on a batch": lambda row: ["Q: " + row["text"]],
}


@pytest.mark.parametrize("function", FORMATS.values(), ids=FORMATS.keys())
def test_a_formatting_function_makes_a_text_of_each_row(function):
    found = formatted(TEXTS, function, "text")
    assert found["text"][:] == [f"Q: {text}" for text in TEXTS["text"]]


@pytest.mark.parametrize("made_of_row", [{"text": "x"}, [{"role": "user", "content": "x"}], 3])
def test_a_formatting_function_that_makes_no_text_is_named(made_of_row):
    with pytest.raises(DataError, match=r"formatting_func returned a.* for row 1: it has to return a str"):
        formatted(TEXTS, lambda row: made_of_row, "text")


def test_a_loss_of_a_model_that_is_not_used_is_said(make_model, tmp_path, caplog):
    model = make_model("llama")
    made(SFTTrainer, model, TEXTS, tmp_path)
    assert "of your own" not in caplog.text
    model.loss_function = lambda logits, labels, **_: logits.sum()

    class Mine(type(model)):
        def forward(self, *arguments, **keywords):
            return super().forward(*arguments, **keywords)

    model.__class__ = Mine
    made(SFTTrainer, model, TEXTS, tmp_path)
    for name in ("forward", "loss_function"):
        assert f"Mine.{name} is of your own: a loss that it computes is not used" in caplog.text
    caplog.clear()
    Mine.forward.__module__, model.loss_function.__module__ = "unsloth_compiled_module_llama", "transformers.loss"
    made(SFTTrainer, model, TEXTS, tmp_path)
    assert "of your own" not in caplog.text
