"""What a model reads beside tokens reaches its forward in every layout and every trainer.

The model here reads `features [E,H]`, one for each place of the token "!" in the flattened grid (as models read images), and
`token_bias [B,T]`, one number per token.
"""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from tests.conftest import WIDTHS, make_tokenizer
from trl.data.inputs import batched, concatenated
from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import DataError
from trl.models.rewards import score_rewards
from trl.models.score import score
from trl.models.value_heads.auto_models import with_value_head
from trl.rewards.model import RewardModel
from trl.rollouts.engine import Prompt
from trl.rollouts.experience import minibatches_from, state_of
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.cpo import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
from trl.trainers.dpo import DPOConfig, DPOTrainer
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.kto import BCOConfig, BCOTrainer, KTOConfig, KTOTrainer, keyed, mismatched
from trl.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.reward import RewardConfig, RewardTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.types import Completion, Concatenated, Example, PerToken
from trl.vision.families import FAMILIES, Family

PLACE = make_tokenizer().convert_tokens_to_ids("!")
HIDDEN = WIDTHS["hidden_size"]
LAYOUTS = ("padded", "packed", "shared")


class ReaderConfig(LlamaConfig):
    model_type = "reader"


class Reader(LlamaModel):
    config_class = ReaderConfig

    def forward(self, input_ids=None, features=None, token_bias=None, **kwargs):
        embeds = self.embed_tokens(input_ids)
        if features is not None:
            places = (input_ids == PLACE)[..., None].expand_as(embeds)
            assert places.sum() == features.numel()
            embeds = embeds.masked_scatter(places, 5 * features.to(embeds))
        if token_bias is not None:
            embeds = embeds + 3 * token_bias[..., None]
        return super().forward(inputs_embeds=embeds, **kwargs)


class ReaderLM(LlamaForCausalLM):
    config_class = ReaderConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Reader(config)

    def forward(
        self, input_ids=None, features=None, token_bias=None, attention_mask=None, position_ids=None,
        past_key_values=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        kwargs.pop("labels", None)
        places = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        out = self.model(input_ids, features, token_bias, **places, **kwargs)
        out["logits"] = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return out

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return {k: v for k, v in inputs.items() if is_first_iteration or k not in ("features", "token_bias")}


class ReaderClassifier(LlamaForSequenceClassification):
    config_class = ReaderConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Reader(config)


AutoModel.register(ReaderConfig, Reader)


@pytest.fixture(autouse=True)
def reader(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "reader", Family(joins={"token_bias": PerToken()}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(cls=ReaderLM, **options):
    torch.manual_seed(0)
    model = cls(ReaderConfig(**WIDTHS, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def features(*seeds: int) -> torch.Tensor:
    return torch.cat([torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def bias(length: int) -> torch.Tensor:
    return torch.arange(length) % 3


def examples() -> list[Example]:
    """One, two and no features, several completions each."""
    answers = (Completion([4, 9]), Completion([18, 2, 6, 3, 12]))
    one = Example([5, PLACE, 18], answers, {"features": features(1), "token_bias": bias(3)})
    two = Example([PLACE, 3, PLACE, 4], answers, {"features": features(2, 3), "token_bias": bias(4)})
    none = Example([5, 6], (Completion([11, 3, 2]),), {"token_bias": bias(2)})
    chat = Example([], (Completion([5, PLACE, 9, 4]),), {"features": features(4), "token_bias": bias(2)})
    return [one, two, none, chat]


def plain_logprobs(model, example: Example, completion: Completion) -> torch.Tensor:
    """Log-probabilities `[C]` from a forward over one sequence."""
    ids = torch.tensor([[*example.prompt, *completion.ids]])
    own = example.inputs["token_bias"]
    token_bias = torch.cat([own, own.new_zeros(ids.shape[1] - len(own))])
    logits = model(ids, example.inputs.get("features"), token_bias[None]).logits[0, :-1]
    found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[len(example.prompt) - 1 :] if example.prompt else torch.cat([torch.zeros(1), found])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_and_gradients_of_plain_forwards(layout):
    model, rows = make(), examples()
    joins = FAMILIES["reader"].joins
    found = score(model, lay_out(rows, layout, capacity=30, joins=joins)).logprobs
    sequences = [(example, completion) for example in rows for completion in example.completions]
    expected = torch.zeros_like(found)
    for n, (example, completion) in enumerate(sequences):
        expected[n, : len(completion)] = plain_logprobs(model, example, completion)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    for mine, plain in zip(ours, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item() + 1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_networks_of_their_own_read_the_inputs(layout):
    policy = with_value_head(make(), num_value_layers=1).eval()
    batch = lay_out(examples(), layout, capacity=30, joins=FAMILIES["reader"].joins)
    found = score(policy, batch, want={"value"}).value
    padded = lay_out(examples(), "padded", joins=FAMILIES["reader"].joins)
    torch.testing.assert_close(found, score(policy, padded, want={"value"}).value, rtol=1e-4, atol=1e-5)
    others = [
        Example(e.prompt, e.completions, {**e.inputs, "token_bias": e.inputs["token_bias"] + 1}) for e in examples()
    ]
    changed = lay_out(others, layout, capacity=30, joins=FAMILIES["reader"].joins)
    assert (score(policy, changed, want={"value"}).value - found).abs().max() > 0.1


def test_inputs_are_joined_by_hand():
    first, second = torch.ones(1, 2, 2), torch.full((2, 3, 1), 2.0)
    whole = concatenated([first, second])
    assert whole.shape == (3, 3, 2)
    assert whole[0].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert whole[1].tolist() == [[2, 0], [2, 0], [2, 0]]
    assert concatenated([first, first], 1).shape == (1, 4, 2)
    joins = {"t": PerToken(), "f": Concatenated()}
    rows = [{"t": torch.tensor([1, 2, 3]), "f": first}, {"t": torch.tensor([4, 5])}]
    assert batched(rows, joins, [2, 1], left=False)["t"].tolist() == [[1, 2], [4, 0]]
    assert batched(rows, joins, [3, 2], left=True)["t"].tolist() == [[1, 2, 3], [0, 4, 5]]
    batch = lay_out(examples()[:1], "shared", joins={"token_bias": PerToken(completion=2)})
    assert batch.inputs["token_bias"].tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 2, 2]]


def test_positions_of_prompts_by_hand():
    """Three tokens in three dimensions, the next at 9: two completions, and a text beside them."""
    own = np.array([[0, 1, 1], [0, 1, 2], [0, 2, 1]])
    pair = Example([5, 6, 7], (Completion([8, 9]), Completion([10])), positions=own, next_position=9)
    text = Example([], (Completion([11, 12]),))
    shared = lay_out([pair, text], "shared", capacity=8)
    expected = [[*row, 9, 10, 9, 0, 1] for row in own.tolist()]
    assert shared.inputs["position_ids"][:, 0].tolist() == expected
    assert shared.segments.offset.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    packed = lay_out([pair, text], "packed", capacity=20).inputs["position_ids"]
    assert packed.shape == (4, 1, 11)
    assert packed[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]
    assert packed[2, 0].tolist() == [0, 1, 2, 9, 10, 0, 1, 2, 9, 0, 1]
    alone = lay_out([text], "packed").inputs["position_ids"]
    assert alone.tolist() == [[0, 1]]
    flat = lay_out([Example([5, 6], (Completion([8]),), positions=[4, 4])], "padded").inputs["position_ids"]
    assert flat.tolist() == [[4, 4, 2]]
    chat = Example([], (Completion([5, 6, 7, 8]),), positions=own[0], next_position=3)
    assert lay_out([chat]).inputs["position_ids"].tolist() == [[0, 1, 1, 3]]


def test_values_per_token_have_to_be_one_per_token():
    joins = {"token_bias": PerToken()}
    short = Example([5, 6, 8], (Completion([4]), Completion([9])), {"token_bias": bias(2)})
    long = Example([5, 6, 8], (Completion([4]), Completion([9])), {"token_bias": bias(4)})
    for example in (short, long):
        with pytest.raises(
            DataError, match=r"'token_bias' needs one value per token, but its shape is .* has 3 tokens"
        ):
            lay_out([example], joins=joins)


def test_encoder_decoders_are_given_tokens_alone():
    with pytest.raises(DataError, match="these rows have inputs \\['features', 'token_bias'\\]"):
        lay_out_encoder_decoder(examples(), pad_token_id=0, decoder_start_token_id=1)


# ---- identity ----


def twins() -> list[Example]:
    """One question about two features."""
    answers = [Completion([4, 9]), Completion([18, 2])]
    return [Example([5, PLACE], (c,), {"features": features(s)}) for s, c in zip((1, 2), answers, strict=True)]


def test_a_prompt_is_its_tokens_and_its_inputs():
    one, other = twins()
    assert one.key != other.key
    assert one.key == Example([5, PLACE], (), {"features": features(1)}).key
    assert one.key != Example([5, PLACE], ()).key
    assert Prompt.of(one).key == one.key


def test_mismatched_prompts_bring_their_inputs():
    one, other = twins()
    first, second = mismatched([one, other])
    assert torch.equal(first.inputs["features"], other.inputs["features"])
    assert torch.equal(second.inputs["features"], one.inputs["features"])
    assert len({key for key, _ in keyed([one, other])}) == 2
    third = Example([5, PLACE], (Completion([3]),), one.inputs)
    assert not any(
        pair.key == mine.key for pair, mine in zip(mismatched([one, third, other]), [one, third, other], strict=True)
    )


def test_reward_models_tell_prompts_apart_by_their_inputs():
    model = make(ReaderClassifier, num_labels=1)
    reward = RewardModel(model, make_tokenizer())
    inputs = [{"features": features(seed).tolist()} for seed in (1, 2)]
    prompts, answers = [[5, PLACE]] * 2, [[4, 9]] * 2
    found = reward(prompts, answers, inputs=inputs)
    assert abs(found[0] - found[1]) > 0.01
    one, _ = twins()
    assert found[0] == pytest.approx(score_rewards(model, lay_out([one])).item(), abs=1e-4)


def test_minibatches_in_a_checkpoint_keep_inputs_and_positions(tmp_path):
    own = np.arange(9).reshape(3, 3)
    example = Example([5, PLACE, 18], (Completion([4], signals={"a": 1.0}),), {"features": features(1)}, own, 12)
    torch.save(state_of([[example]]), tmp_path / "state.pt")
    (((found,),)) = minibatches_from(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (found.key, found.next_position, found.completions) == (example.key, 12, example.completions)
    assert np.array_equal(np.asarray(found.positions), own)


# ---- sampling ----


NO_PLACE = GenerationConfig(suppress_tokens=[PLACE])


@pytest.mark.parametrize("way", ["shared", "repeated", "generate"])
def test_samples_have_the_log_probabilities_of_plain_forwards(way):
    """Of prompts of several lengths, with one, two and no features; one whose last token has a value of its own."""
    model = make()
    engine = LocalEngine(model, progress=False)
    engine._ways[model] = way
    if way == "generate":
        engine._said.add("The engine does not support ReaderLM")
    params = SamplingParams(max_new_tokens=4, seed=1, ignore_eos=True, generation_config=NO_PLACE)
    found = engine.generate([Prompt.of(e) for e in examples()[:3]], params, 2)
    for example, samples in zip(examples(), found, strict=False):
        for sample in samples:
            expected = plain_logprobs(model, example, Completion(sample.ids))
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-3, atol=1e-4)


def test_a_prompt_that_ends_in_text_is_prefilled_once_for_all_samples():
    model, lengths = make(), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    engine = LocalEngine(model, progress=False)
    engine._ways[model] = "shared"
    rows = [
        Prompt([5, PLACE, 18], {"features": features(seed), "token_bias": torch.tensor([1, 2, 0])}) for seed in (1, 2)
    ]
    one, other = engine.generate(rows, SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True), 3)
    hook.remove()
    assert lengths == [(2, 2), (6, 1), (6, 1)]
    assert one[0].logprobs != other[0].logprobs


# ---- trainers ----

WORDS = ["say a! b", "tell c! d", "ask e! f", "give g! h"] * 2


def columns(tokenizer) -> list[dict]:
    ids = [tokenizer(text)["input_ids"] for text in WORDS]
    return [
        {"features": features(i).tolist(), "token_bias": [(t + i) % 2 for t in range(len(row) - 1)] + [0]}
        for i, row in enumerate(ids)
    ]


def rows(kind: str) -> Dataset:
    tokenizer = make_tokenizer()
    answers = [f"yes {c}" for c in "abcdefgh"]
    pairs = {"chosen": answers, "rejected": [f"no {c}" for c in "hgfedcba"]}
    by_kind = {
        "completion": {"completion": answers},
        "pairs": pairs,
        "labelled": {"completion": answers, "label": [True, False] * 4},
        "prompts": {},
    }
    return Dataset.from_dict({"prompt": WORDS, "inputs": columns(tokenizer), **by_kind[kind]})


def trainer_of(name: str, tmp_path, data: Dataset, **options):
    config_class, trainer_class, kind, own = TRAINERS[name]
    online = {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
    common = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        **(online if kind == "prompts" and name != "ppo" else {}),
        **own,
        **options,
    }
    cls = ReaderClassifier if name == "reward" else ReaderLM
    extra = {"num_labels": 1} if name == "reward" else {}
    keywords = {"reward_funcs": of_letters} if kind == "prompts" else {}
    return trainer_class(
        model=make(cls, **extra), args=config_class(**common), train_dataset=data, processing_class=make_tokenizer(),
        **keywords,
    )  # fmt: skip


def of_letters(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


TRAINERS = {
    "sft": (SFTConfig, SFTTrainer, "completion", {}),
    "reward": (RewardConfig, RewardTrainer, "pairs", {}),
    "dpo": (DPOConfig, DPOTrainer, "pairs", {}),
    "dpo precomputed": (DPOConfig, DPOTrainer, "pairs", {"precompute_ref_log_probs": True}),
    "cpo": (CPOConfig, CPOTrainer, "pairs", {}),
    "orpo": (ORPOConfig, ORPOTrainer, "pairs", {}),
    "kto": (KTOConfig, KTOTrainer, "labelled", {}),
    "bco": (BCOConfig, BCOTrainer, "labelled", {}),
    "grpo": (GRPOConfig, GRPOTrainer, "prompts", {"beta": 0.1}),
    "rloo": (RLOOConfig, RLOOTrainer, "prompts", {}),
    "online dpo": (OnlineDPOConfig, OnlineDPOTrainer, "prompts", {}),
    "ppo": (
        PPOConfig,
        PPOTrainer,
        "prompts",
        {"max_completion_length": 4, "ppo_epochs": 1, "batch_size": 4, "mini_batch_size": 4},
    ),
}


def history(trainer) -> list[float]:
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "grad_norm") if name in entry]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_reads_them_in_every_layout(name, tmp_path):
    """The same losses and gradients in all layouts, which need the inputs."""
    found = {layout: history(trainer_of(name, tmp_path, rows(TRAINERS[name][2]), layout=layout)) for layout in LAYOUTS}
    assert len(found["padded"]) == 4
    for layout in LAYOUTS:
        assert found[layout] == pytest.approx(found["padded"], rel=2e-4, abs=2e-5), layout
    data = rows(TRAINERS[name][2])
    others = [{**row, "features": (-5 * torch.tensor(row["features"])).tolist()} for row in data["inputs"]]
    data = data.remove_columns("inputs").add_column("inputs", others)
    assert history(trainer_of(name, tmp_path, data)) != pytest.approx(found["padded"], rel=2e-3)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_sampler_finds_what_training_finds(name, tmp_path):
    trainer = trainer_of(name, tmp_path, rows("prompts"), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_triplets_bring_their_inputs(tmp_path):
    """Queries that differ in their inputs alone are no group, and `step` scores each with its own."""
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, output_dir=str(tmp_path), use_cpu=True)
    trainer = PPOTrainer(config, make(), None, make_tokenizer())
    queries, inputs = [torch.tensor([5, PLACE, 18])] * 2, [{"features": features(seed)} for seed in (1, 2)]
    responses = trainer.generate(queries, query_inputs=inputs, return_prompt=False, max_new_tokens=3, do_sample=True)
    seen = trainer.step(queries, responses, [1.0, -1.0], query_inputs=inputs)
    assert seen["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert seen["ppo/mean_non_score_reward"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(DataError, match="query_inputs has 1 entries"):
        trainer.step(queries, responses, [1.0, -1.0], query_inputs=inputs[:1])
