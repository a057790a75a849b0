from __future__ import annotations

import math
import re

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tests.conftest import make_tokenizer
from trl import SFTConfig, SFTTrainer
from trl.data.completion_collator import DataCollatorForCompletionOnlyLM
from trl.errors import ConfigError, DataError, ModelError

TEXTS = [f"cat {i % 5} sat on mat {i % 3}." for i in range(24)]
LORA = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"])


def rows() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def config(tmp_path, **options) -> SFTConfig:
    defaults = {"output_dir": str(tmp_path), "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
    return SFTConfig(**{**defaults, "logging_steps": 1, "bf16": False, **options})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the two forms of the call ----


def test_classic_form_runs_with_nothing_else(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "model")
    make_model("gpt2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    trainer = SFTTrainer(folder, train_dataset=rows(), dataset_text_field="text", max_seq_length=16)
    assert trainer.args.max_length == 16
    assert trainer.model.dtype == torch.float32
    trainer.train()
    assert trainer.state.global_step == 9


def test_both_forms_give_the_same_run(make_model, tokenizer, tmp_path):
    new = SFTTrainer(make_model("llama"), config(tmp_path, max_length=12), None, rows(), processing_class=tokenizer)
    old = SFTTrainer(
        model=make_model("llama"), args=config(tmp_path), train_dataset=rows(), tokenizer=tokenizer, max_seq_length=12
    )
    new.train()
    old.train()
    assert losses(new) == losses(old)
    assert new.tokenizer is old.processing_class is tokenizer


def test_how_older_scripts_read_rows(make_model, tokenizer, tmp_path):
    given = {"dataset_kwargs": {"add_special_tokens": False, "append_concat_token": False}, "infinite": True}
    args = config(tmp_path, **given)
    trainer = SFTTrainer(make_model("llama"), args, None, rows(), tokenizer=tokenizer, compute_metrics=None)
    assert tokenizer.decode(trainer.train_dataset[0]["completion_ids"][0]) == TEXTS[0]


def test_plain_training_arguments_and_old_option_names(make_model, tokenizer, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, learning_rate=0.5, save_strategy="no")
    trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows(), tokenizer=tokenizer)
    assert isinstance(trainer.args, SFTConfig)
    assert trainer.args.learning_rate == 0.5
    old = SFTConfig(output_dir=str(tmp_path), max_seq_length=7, evaluation_strategy="no", warmup_ratio=0.1)
    assert (old.max_length, old.warmup_steps) == (7, 0.1)
    with pytest.raises(ConfigError, match="warmup_ratio=3 has to be a share"):
        SFTConfig(output_dir=str(tmp_path), warmup_ratio=3)


def test_a_formatting_function_of_a_row_and_of_many(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"q": ["one", "two"], "a": ["1", "2"]})
    expected = [[*tokenizer("one: 1")["input_ids"], tokenizer.eos_token_id]]
    of_row = lambda row: f"{row['q']}: {row['a']}"  # noqa: E731
    of_many = lambda rows: [f"{q}: {a}" for q, a in zip(rows["q"], rows["a"], strict=True)]  # noqa: E731
    for function in (of_row, of_many):
        trainer = SFTTrainer(
            make_model("llama"), config(tmp_path), train_dataset=data, tokenizer=tokenizer, formatting_func=function
        )
        assert trainer.train_dataset[0]["completion_ids"] == expected


# ---- what training does ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "mamba"])
def test_the_loss_falls(make_model, tokenizer, tmp_path, name):
    args = config(tmp_path, max_steps=12, learning_rate=3e-3, lr_scheduler_type="constant")
    trainer = SFTTrainer(make_model(name), args, train_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_an_encoder_decoder_learns(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict(
        {"prompt": [f"say {i % 4}" for i in range(16)], "completion": [str(i % 4) for i in range(16)]}
    )
    args = config(tmp_path, max_steps=30, learning_rate=3e-3, lr_scheduler_type="constant")
    trainer = SFTTrainer(make_model("t5"), args, train_dataset=data, tokenizer=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def test_metrics_by_hand(make_model, tokenizer, tmp_path):
    """A head of zeros is uniform: loss and entropy are ln V, whatever the rows."""
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=24, learning_rate=0.0)
    trainer = SFTTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert logged["loss"] == pytest.approx(math.log(99), rel=1e-6)
    assert logged["entropy"] == pytest.approx(math.log(99), rel=1e-6)
    assert logged["num_tokens"] == tokens
    assert logged["tokens_per_second"] > 0
    assert 0 <= logged["padding_share"] < 0.2
    assert trainer.encoded["train"].report.trained == tokens - len(TEXTS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(99), rel=1e-6)


def test_label_smoothing_and_dft_by_hand(make_model, tokenizer, tmp_path):
    """Uniform: smoothing leaves ln V; DFT weights it by 1/V."""
    for options, expected in (({"label_smoothing_factor": 0.3}, 1.0), ({"loss_type": "dft"}, 1 / 99)):
        model = make_model("llama")
        torch.nn.init.zeros_(model.lm_head.weight)
        trainer = SFTTrainer(model, config(tmp_path, max_steps=1, **options), train_dataset=rows(), tokenizer=tokenizer)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(expected * math.log(99), rel=1e-5)


def test_evaluation_is_a_mean_over_the_whole_set(make_model, tokenizer, tmp_path):
    """Batches of one and of many give the same, as batch means averaged would not; sets have their names."""
    data = Dataset.from_dict({"text": ["a", "bb ccc dddd", "e e e e e e e e e e"]})
    found = []
    for size in (1, 3):
        args = config(tmp_path, per_device_eval_batch_size=size)
        trainer = SFTTrainer(
            make_model("llama"), args, train_dataset=rows(), eval_dataset={"x": data, "y": rows()}, tokenizer=tokenizer
        )
        found.append(trainer.evaluate())
    assert found[0]["eval_x_loss"] == pytest.approx(found[1]["eval_x_loss"], rel=1e-6)
    assert found[0]["eval_y_mean_token_accuracy"] == pytest.approx(found[1]["eval_y_mean_token_accuracy"], rel=1e-6)


def test_streaming(make_model, tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    trainer = SFTTrainer(make_model("llama"), config(tmp_path), train_dataset=stream, tokenizer=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.encoded["train"].report.rows >= 16


def test_neftune_adds_noise_in_training_only(make_model, tokenizer, tmp_path):
    found = []
    for alpha in (None, 5.0):
        args = config(tmp_path, max_steps=1, neftune_noise_alpha=alpha, learning_rate=0.0)
        trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer)
        trainer.train()
        found.append((losses(trainer)[0], trainer.evaluate()["eval_loss"]))
    assert trainer.layout == "padded"  # the noise depends on a row's length
    assert found[0][0] != found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_a_collator_of_the_users_decides_what_is_trained_on(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"text": ["ask: me\nsay: yes", "ask: you there\nsay: no"]})
    collator = DataCollatorForCompletionOnlyLM("say:", tokenizer=tokenizer)
    seen: list[list[int]] = []

    class Spy(SFTTrainer):
        def loss(self, model, batch):
            seen.append(batch.target.flatten()[batch.scored].tolist())
            return super().loss(model, batch)

    args = config(tmp_path, max_steps=1, per_device_train_batch_size=2)
    trainer = Spy(make_model("llama"), args, data_collator=collator, train_dataset=data, tokenizer=tokenizer)
    trainer.train()
    assert sorted(tokenizer.decode(seen[0]).split("</s>")) == ["", " no", " yes"]


def test_a_chat_template_from_a_file(make_model, tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}. {% endfor %}")
    data = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]}
    )
    args = config(tmp_path, chat_template_path=str(tmp_path / "chat.jinja"))
    trainer = SFTTrainer(make_model("llama"), args, train_dataset=data, tokenizer=bare)
    assert bare.decode(trainer.train_dataset[0]["completion_ids"][0]) == "user: hi. assistant: yo. "


def test_dropout_is_switched_off(make_model, tokenizer, tmp_path):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    args = config(tmp_path, disable_dropout=True, max_steps=1, learning_rate=0.0, per_device_train_batch_size=24)
    trainer = SFTTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


# ---- adapters ----


def test_a_new_adapter_trains_and_the_base_does_not(make_model, tokenizer, tmp_path):
    model = make_model("llama")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = config(tmp_path, learning_rate=1e-2)
    trainer = SFTTrainer(model, args, train_dataset=rows(), tokenizer=tokenizer, peft_config=LORA)
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(changed) == 4
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter.cpu(), base[name.replace(".base_layer", "")])
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_that_was_loaded_frozen_is_trained(make_model, tokenizer, tmp_path, caplog):
    get_peft_model(make_model("llama"), LORA).save_pretrained(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapter"))
    trainer = SFTTrainer(model, config(tmp_path, learning_rate=1e-2), train_dataset=rows(), tokenizer=tokenizer)
    assert "was loaded frozen" in caplog.text
    trainer.train()
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_nothing_that_trains_is_an_error(make_model, tokenizer, tmp_path):
    model = make_model("llama").requires_grad_(False)
    with pytest.raises(ModelError, match="Nothing trains: every parameter of this LlamaForCausalLM"):
        SFTTrainer(model, config(tmp_path), train_dataset=rows(), tokenizer=tokenizer)


def test_two_adapters_at_once_are_an_error(make_model, tokenizer, tmp_path):
    model = get_peft_model(make_model("llama"), LORA)
    with pytest.raises(ConfigError, match="the model already carries the adapter"):
        SFTTrainer(model, config(tmp_path), train_dataset=rows(), tokenizer=tokenizer, peft_config=LORA)


def test_gradient_checkpointing_gives_the_same_losses(make_model, tokenizer, tmp_path):
    found = []
    for on in (False, True):
        args = config(tmp_path, gradient_checkpointing=on, learning_rate=1e-2)
        trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows(), tokenizer=tokenizer, peft_config=LORA)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ---- what is left behind ----


def test_a_saved_model_loads_and_has_a_card(make_model, tokenizer, tmp_path):
    args = config(tmp_path, save_strategy="steps", save_steps=1)
    trainer = SFTTrainer(make_model("llama"), args, train_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    trainer.save_model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    ids = torch.tensor([[7, 8, 9]])
    trained = trainer.model.eval().cpu()
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    card = (tmp_path / "README.md").read_text()
    assert "trained with SFT" in card
    assert "24 rows" in card


# ---- bad input, with the words ----


def test_missing_column(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"texts": TEXTS})
    with pytest.raises(DataError, match="texts"):
        SFTTrainer(make_model("llama"), config(tmp_path), train_dataset=data, tokenizer=tokenizer)


def test_wrong_type_in_a_row(make_model, tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"text": "fine"}, {"text": "fine"}, {"text": 7}]))
    trainer = SFTTrainer(make_model("llama"), config(tmp_path), train_dataset=stream, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"[Rr]ow 3.*text"):
        trainer.train()


def test_empty_dataset(make_model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="dataset 'train' is empty"):
        SFTTrainer(make_model("llama"), config(tmp_path), train_dataset=rows().select([]), tokenizer=tokenizer)


def test_last_turn_is_not_the_assistants(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"messages": [[{"role": "user", "content": "hi"}]]})
    with pytest.raises(DataError, match=r"[Rr]ow 1.*assistant"):
        SFTTrainer(
            make_model("llama"), config(tmp_path, assistant_only_loss=True), train_dataset=data, tokenizer=tokenizer
        )


def test_a_template_that_cannot_be_masked(make_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = Dataset.from_dict({"messages": [turns]})
    with pytest.raises(DataError, match="template"):
        SFTTrainer(
            make_model("llama"), config(tmp_path, assistant_only_loss=True), train_dataset=data, tokenizer=tokenizer
        )


def test_unknown_keywords(make_model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="SFTTrainer has no argument 'max_seq_len'. Did you mean .*'max_seq_length'"):
        SFTTrainer(make_model("llama"), train_dataset=rows(), tokenizer=tokenizer, max_seq_len=3)
    for name, words in {
        "compute_loss_func": r"'compute_loss_func'. .*logits .* Override `loss\(",
        "generate_during_eval": "'generate_during_eval'. `log_completions`",
    }.items():
        with pytest.raises(ConfigError, match=f"SFTTrainer has no argument {words}"):
            SFTTrainer(make_model("llama"), train_dataset=rows(), tokenizer=tokenizer, **{name: 1})
    with pytest.raises(ConfigError, match="'max_length' and 'max_seq_length', two names of the option"):
        SFTTrainer(make_model("llama"), train_dataset=rows(), tokenizer=tokenizer, max_length=3, max_seq_length=4)
    with pytest.raises(ConfigError, match="SFTConfig has no option 'packin'. Did you mean 'packing'"):
        SFTConfig(output_dir=str(tmp_path), packin=True)
    with pytest.raises(ConfigError, match="Unknown loss_type 'nil'. Did you mean 'nll'"):
        SFTConfig(output_dir=str(tmp_path), loss_type="nil")
    with pytest.raises(ConfigError, match="Unknown loss_type 'nil'. Did you mean 'nll'"):
        SFTTrainer(make_model("llama"), config(tmp_path), None, rows(), tokenizer=tokenizer, loss_type="nil")
    with pytest.raises(ConfigError, match="dataset_kwargs has no entry 'skip'"):
        SFTConfig(dataset_kwargs={"skip": True})
    with pytest.raises(ConfigError, match="Unknown lr_scheduler_type 'cosin'. Did you mean 'cosine'"):
        SFTConfig(lr_scheduler_type="cosin")
    with pytest.raises(ConfigError, match="'max_length' and 'max_seq_length', two names of the option"):
        SFTConfig(output_dir=str(tmp_path), max_length=3, max_seq_length=4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_metrics_of_a_users_own(make_model, tokenizer, tmp_path, name):
    """The loss and accuracy from all logits are those that the trainer finds by itself."""
    shift = 0 if name == "t5" else 1  # a decoder's logits are about the next token
    seen = []

    def of_all(prediction):
        logits = torch.tensor(prediction.predictions)[:, : prediction.predictions.shape[1] - shift]
        labels = torch.tensor(prediction.label_ids)[:, shift:]
        right = (logits.argmax(-1) == labels)[labels != -100].float().mean()
        return {"own_loss": torch.nn.functional.cross_entropy(logits.mT, labels).item(), "own_accuracy": right.item()}

    def kept(logits, labels):
        seen.append((logits.shape[:2], labels.shape))
        return logits

    pairs = Dataset.from_dict({"prompt": [t[:4] for t in TEXTS], "completion": [t[4:] for t in TEXTS]})
    own = {"compute_metrics": of_all, "preprocess_logits_for_metrics": kept}
    args = config(tmp_path, per_device_eval_batch_size=5)
    found = SFTTrainer(make_model(name), args, None, pairs, pairs, tokenizer=tokenizer, **own).evaluate()
    assert found["eval_own_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    assert found["eval_own_accuracy"] == pytest.approx(found["eval_mean_token_accuracy"], abs=1e-6)
    assert [logits for logits, _ in seen] == [labels for _, labels in seen]


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_packing_with_an_incompatible_model(make_model, tokenizer, tmp_path, name):
    args = config(tmp_path, packing=True, max_length=32)
    with pytest.raises(
        ConfigError, match=r"packing=True does not work with \w+: .*Documents would attend to each other"
    ):
        SFTTrainer(make_model(name), args, train_dataset=rows(), tokenizer=tokenizer)


def test_max_length_that_drops_everything(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": ["a long prompt"], "completion": ["x"]})
    with pytest.raises(DataError, match=r"No row of 'train' has a token left.*max_length=5.*Raise max_length"):
        SFTTrainer(make_model("llama"), config(tmp_path, max_length=5), train_dataset=data, tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_be_found(make_model, tmp_path):
    with pytest.raises(ConfigError, match="processing_class is missing: this LlamaForCausalLM was created from a conf"):
        SFTTrainer(make_model("llama"), config(tmp_path), train_dataset=rows())


def test_two_names_of_one_argument(make_model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="processing_class and tokenizer are two names"):
        SFTTrainer(
            make_model("llama"), config(tmp_path), train_dataset=rows(), tokenizer=tokenizer, processing_class=tokenizer
        )


# ---- scripts as they were written for other releases ----


def trained_on(trainer) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of the trainer's first batch."""
    examples = next(iter(trainer.get_train_dataloader()))
    return sorted((list(e.completions[0].ids), list(e.completions[0].mask)) for e in examples)


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Ids `[B,T]` and labels, which leave out padding and each row's first two tokens; no mask."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def test_a_collator_without_a_mask_or_without_padding(make_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10, 11, 12]]})

    def flattened(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        labels = [-100 if p < 2 else i for i, p in zip(ids, positions, strict=True)]
        return {n: torch.tensor([v]) for n, v in (("input_ids", ids), ("labels", labels), ("position_ids", positions))}

    options = {"per_device_train_batch_size": 2, "max_steps": 1}
    for collator, expected in (
        (padded, [([5, 6, 7, 0, 0], [0, 0, 1, 0, 0]), ([8, 9, 10, 11, 12], [0, 0, 1, 1, 1])]),
        (flattened, [([5, 6, 7], [0, 0, 1]), ([8, 9, 10, 11, 12], [0, 0, 1, 1, 1])]),
    ):
        trainer = SFTTrainer(make_model("llama"), config(tmp_path, **options), collator, data, tokenizer=tokenizer)
        assert trained_on(trainer) == expected
        trainer.train()
        assert trainer.predict(data).metrics["test_loss"] > 0


def test_raw_rows_for_a_collator(make_model, tokenizer, tmp_path):
    args = config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)

    def collate(found):
        return padded([{"input_ids": tokenizer(row["text"])["input_ids"]} for row in found])

    trainer = SFTTrainer(make_model("llama"), args, collate, rows(), rows().select(range(2)), tokenizer=tokenizer)
    trainer.train()
    trainer.preview(1)
    assert trainer.train_dataset.column_names == ["text"]
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ConfigError, match="these have no input_ids: give a data_collator"):
        SFTTrainer(make_model("llama"), args, None, rows(), tokenizer=tokenizer)


def test_a_preview_of_packed_rows_says_which_documents_they_hold(make_model, tokenizer, tmp_path, capsys):
    """Documents stand in another order than rows: their numbers are not those of the dataset."""
    texts = Dataset.from_dict({"text": ["a" * 5, "b" * 9, "c" * 6]})
    args = config(tmp_path, packing=True, max_length=16)
    SFTTrainer(make_model("llama"), args, None, texts, processing_class=tokenizer).preview(3)
    shown = capsys.readouterr().out
    numbers = re.findall(r"^packed row (\d), document (\d): (\d+) tokens", shown, re.MULTILINE)
    assert numbers == [("1", "1", "10"), ("1", "2", "6"), ("2", "1", "7")]
    assert "train: 3 rows, 23 tokens" in shown


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda b: {"input_ids": b["input_ids"]}, "of data_collator has no labels, only .'input_ids'.: give"),
        (lambda b: {**b, "labels": b["labels"] + 1}, "labels of data_collator have to equal input_ids, or be -100"),
        (lambda b: {**b, "labels": b["labels"][:, 1:]}, "For an encoder-decoder leave the collator out"),
    ],
)
def test_a_collator_that_gives_something_else(make_model, tokenizer, tmp_path, made, words):
    trainer = SFTTrainer(make_model("llama"), config(tmp_path), lambda r: made(padded(r)), rows(), tokenizer=tokenizer)
    with pytest.raises(DataError, match=words):
        trainer.train()


@pytest.mark.parametrize(
    ("train", "evaluation", "words"),
    [
        (
            DatasetDict({"train": rows()}),
            None,
            r"train_dataset has the splits \['train'\]: give .* dataset\['train'\]",
        ),
        ([{"text": "a"}], None, r"train_dataset has to be a Dataset .* got list: datasets.Dataset.from_list\(rows\)"),
        (rows(), {"a": [1]}, r"eval_dataset\['a'\] has to be a Dataset .* got list"),
    ],
)
def test_what_is_no_dataset(make_model, tokenizer, tmp_path, train, evaluation, words):
    with pytest.raises(ConfigError, match=words):
        SFTTrainer(make_model("llama"), config(tmp_path), None, train, evaluation, tokenizer=tokenizer)


def test_hooks_of_transformers_are_called(make_model, tokenizer, tmp_path):
    called = []

    class Mine(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            called.append(sorted(outputs))
            return (2 * loss, outputs) if return_outputs else 2 * loss

        def create_optimizer(self, *args):
            called.append("create_optimizer")
            return super().create_optimizer(*args)

        def get_train_dataloader(self):
            called.append("get_train_dataloader")
            return DataLoader([{"input_ids": [5, 6, 7]}] * 4, batch_size=2, collate_fn=padded)

        def log(self, logs, *args):
            super().log({**logs, "mine": 1}, *args)

    trainer = Mine(make_model("llama"), config(tmp_path, max_steps=1), train_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    assert called[:2] == ["get_train_dataloader", "create_optimizer"]
    assert called[2] == ["entropy", "mean_token_accuracy"]
    assert trainer.state.log_history[0]["mine"] == 1


def test_hooks_that_nothing_calls_are_refused():
    with pytest.raises(ConfigError, match=r"Mine\._prepare_dataset would never be called.* override `encode\("):

        class Mine(SFTTrainer):
            def _prepare_dataset(self, *_):
                """Of another release."""


def test_a_loss_written_for_dicts_says_what_to_override(make_model, tokenizer, tmp_path):
    class Mine(SFTTrainer):
        def compute_loss(self, model, inputs, **_):
            return model(**inputs).loss

    trainer = Mine(make_model("llama"), config(tmp_path), train_dataset=rows(), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"not a dict of input_ids.* override `loss\(model, batch\)"):
        trainer.train()
