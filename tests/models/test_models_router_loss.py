"""The load-balancing loss of mixtures of experts: transformers' number, whatever the split and the layout."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.conftest import WIDTHS, make_tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.errors import ConfigError
from trl.models.router_loss import RouterLoss, router_loss_of

MOE = {**WIDTHS, "output_router_logits": True, "router_aux_loss_coef": 0.5, "num_experts_per_tok": 2}
MODELS = {
    "qwen3": lambda **kw: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{**MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, **kw})
    ),
    "mixtral": lambda **kw: MixtralForCausalLM(MixtralConfig(**{**MOE, "num_local_experts": 4, **kw})),
    "olmoe": lambda **kw: OlmoeForCausalLM(OlmoeConfig(**{**MOE, "num_experts": 4, **kw})),
    "gpt_oss": lambda **kw: GptOssForCausalLM(
        GptOssConfig(
            **{
                **MOE,
                "num_local_experts": 4,
                "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                **kw,
            }
        )
    ),
}
TEXTS = ["The fox.", "A lazy dog runs far away.", "So it does, they say", "Hm"]
PAIRS = {"prompt": ["Why so", "And"], "chosen": [" it is.", " then"], "rejected": [" no", " never, ever."]}


def make(name="qwen3", **kw):
    torch.manual_seed(0)
    model = MODELS[name](**kw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def step_of(trainer_class, config_class, model, rows, tmp_path, **options):
    """(loss, gradients, metrics) of one step on all rows: with plain SGD at rate 1, what the step took away."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = {
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    shown = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "html_report": False, "report_to": []}
    config = config_class(output_dir=str(tmp_path), **{**plain, **shown, **options})
    trainer = trainer_class(
        model, args=config, train_dataset=Dataset.from_dict(rows), processing_class=make_tokenizer()
    )
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], {name: before[name] - p.detach().cpu() for name, p in model.named_parameters()}, log


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, value in expected[1].items():
        tolerance = 2e-5 * value.abs().max().item() + 1e-6
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_loss_of_transformers(tmp_path, name):
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = (torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]).long()
    labels = padded.masked_fill(mask == 0, -100)
    expected = make(name)(input_ids=padded, attention_mask=mask, labels=labels)
    loss, _, log = step_of(SFTTrainer, SFTConfig, make(name), {"text": TEXTS}, tmp_path, per_device_train_batch_size=4)
    assert log["aux_loss"] == pytest.approx(expected.aux_loss.item(), rel=1e-4)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "layout": "padded"},
        {"per_device_train_batch_size": 4, "layout": "packed", "gradient_checkpointing": True},
    ],
    ids=["split", "padded", "checkpointed"],
)
def test_a_step_depends_on_its_rows_alone(tmp_path, options):
    whole = step_of(
        SFTTrainer, SFTConfig, make(), {"text": TEXTS}, tmp_path, per_device_train_batch_size=4, layout="packed"
    )
    assert_same(step_of(SFTTrainer, SFTConfig, make(), {"text": TEXTS}, tmp_path, **options), whole)


def test_a_shared_prompt_counts_for_each_of_its_completions(tmp_path):
    found = [
        step_of(
            DPOTrainer, DPOConfig, make(), PAIRS, tmp_path, per_device_train_batch_size=rows, layout=layout, **options
        )
        for rows, layout, options in (
            (2, "padded", {}),
            (2, "shared", {}),
            (1, "shared", {"gradient_accumulation_steps": 2}),
        )
    ]
    assert found[0][2]["aux_loss"] > 0
    for each in found[1:]:
        assert_same(each, found[0])


def test_the_option_comes_before_the_configuration(tmp_path):
    assert router_loss_of(make(output_router_logits=False), None) is None
    assert router_loss_of(make(), 0.0) is None
    assert router_loss_of(make(), None).coefficient == 0.5
    assert router_loss_of(make(output_router_logits=False), 0.1).coefficient == 0.1


def test_what_has_no_such_loss_is_refused_by_name(make_model):
    with pytest.raises(ConfigError, match="router_aux_loss_coef.*LlamaForCausalLM"):
        router_loss_of(make_model("llama"), 0.1)
    llama4 = Llama4ForCausalLM(Llama4TextConfig(**{**MOE, "num_local_experts": 2, "intermediate_size_mlp": 48}))
    with pytest.raises(
        ConfigError, match="load-balancing loss.*Llama4ForCausalLM|Llama4ForCausalLM.*no load-balancing loss"
    ):
        RouterLoss(llama4, 0.1)


def test_passes_that_keep_no_gradient_are_refused(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="use_reentrant"):
        step_of(SFTTrainer, SFTConfig, make(), {"text": TEXTS}, tmp_path, per_device_train_batch_size=4, **options)


class Unread(TorchDispatchMode):
    """Raises where a number is copied to the host, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_in_a_micro_batch(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        make(), SFTConfig(str(tmp_path), report_to=[]), train_dataset=rows, processing_class=make_tokenizer()
    )
    batch = trainer.collate(trainer.items(trainer.to_examples(list(trainer.train_dataset)), source=""))
    with Unread():
        trainer.term.loss([torch.rand(batch.copies.numel(), 4)], batch)
