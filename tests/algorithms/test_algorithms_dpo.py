"""The DPO family: every loss against numbers worked by hand, identities, and the options object."""

import math

import pytest
import torch

from tests.algorithms.support import make_batch
from trl.algorithms import dpo
from trl.algorithms.dpo import DPO, LOSSES
from trl.algorithms.pairs import VIEWS
from trl.errors import ConfigError, DataError
from trl.types import Scores

LN2 = math.log(2)


def softplus(x):
    """log(1 + e^x) = −log σ(−x)."""
    return math.log(1 + math.exp(x))


def sigma(x):
    return 1 / (1 + math.exp(-x))


def make(rows, ref_rows, *, collision=None, dtype=torch.float32):
    """Scores and batch from ragged log-probabilities per token, chosen and rejected in turn."""

    def pad(ragged):
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in ragged], dtype=dtype)

    mask = pad([[1.0] * len(row) for row in rows])
    batch = make_batch(mask, **({} if ref_rows is None else {"ref_logprobs": pad(ref_rows)}))
    return Scores(pad(rows), collision=None if collision is None else pad(collision)), batch


# One pair: chosen of two tokens with h = 0.6, rejected of three tokens with h = −0.3.
CHOSEN, REJECTED = [-0.4, -1.0], [-0.5, -0.7, -0.9]
REF_CHOSEN, REF_REJECTED = [-0.8, -1.2], [-0.4, -0.8, -0.6]
PAIR = ([CHOSEN, REJECTED], [REF_CHOSEN, REF_REJECTED])
LENGTHS = (2, 3)

# With β = 2: rewards 1.2 and −0.6, difference d = 1.8; per token h is 0.3 and −0.1, difference 0.4.
EXPECTED = {
    "sigmoid": softplus(-1.8),
    "sigmoid_norm": softplus(-0.8),
    "hinge": 0.0,
    "ipo": (0.4 - 0.25) ** 2,
    "exo_pair": sigma(1.8) * math.log(sigma(1.8) / 0.9) + sigma(-1.8) * math.log(sigma(-1.8) / 0.1),
    "robust": (0.9 * softplus(-1.8) - 0.1 * softplus(1.8)) / 0.8,
    "discopop": (1 - sigma(36.0)) * softplus(-1.8) + sigma(36.0) * math.exp(-1.8),
    "nca_pair": softplus(-1.2) + 0.5 * softplus(1.2) + 0.5 * softplus(-0.6),
    "bco_pair": softplus(-1.2) + softplus(-0.6),
    "sppo_hard": (0.6 - 0.25) ** 2 + (-0.3 + 0.25) ** 2,
    "apo_zero": 1 - sigma(1.2) + sigma(-0.6),
    "apo_down": sigma(1.2) + 1 - sigma(1.8),
    "aot": softplus(-1.8),
    "aot_unpaired": softplus(-1.8),
    "sft": 0.7,
    # log-probabilities −1.4 and −2.1: per token both −0.7
    "cpo": softplus(-2 * 0.7) + 0.7,
    "simpo": softplus(0.5),
    "alphapo": softplus(0.5),
    "orpo": 0.7 + 2 * LN2,
}
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_number_worked_by_hand(name):
    algorithm = DPO(loss_types=name, beta=2.0, label_smoothing=SMOOTHED.get(name, 0.0))
    loss, _ = algorithm.loss(*make(*PAIR))
    assert loss.tolist() == pytest.approx([EXPECTED[name]], rel=1e-5, abs=1e-6)


def test_hinge_grows_linearly_below_its_margin():
    chosen, rejected = torch.tensor([0.0, 0.2, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    assert dpo.hinge(chosen, rejected, beta=2.0).tolist() == pytest.approx([3.0, 0.6, 0.0])


# At policy = reference every log-ratio is zero.
AT_REFERENCE = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "robust": LN2,
    "discopop": 0.5 * LN2 + 0.5,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": LN2,
    "aot_unpaired": LN2,
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_policy_at_the_reference(name):
    scores, batch = make([CHOSEN, REJECTED] * 2, [CHOSEN, REJECTED] * 2)
    loss, metrics = DPO(loss_types=name, beta=0.1, label_smoothing=SMOOTHED.get(name, 0.0)).loss(scores, batch)
    assert loss.tolist() == pytest.approx([AT_REFERENCE[name]] * 2, rel=1e-6)
    assert metrics["rewards/margins"].tolist() == [0.0, 0.0]
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_every_loss_that_needs_a_reference_is_covered_at_the_reference():
    assert {name for name, loss in LOSSES.items() if loss.needs_reference} == set(AT_REFERENCE)


@pytest.mark.parametrize("name", [n for n in AT_REFERENCE if n not in ("apo_down", "discopop")])
def test_at_the_reference_the_gradient_raises_chosen_over_rejected(name):
    h = torch.zeros(2, 1, requires_grad=True)
    loss = LOSSES[name].formula
    keywords = {"beta": 0.1, "label_smoothing": SMOOTHED.get(name, 0.0), "discopop_tau": 0.05}
    inputs = (h[0] - h[1], torch.zeros(1)) if name == "aot" else (h[0], h[1])
    loss(*inputs, **{k: keywords[k] for k in LOSSES[name].options}).sum().backward()
    assert h.grad[0] < h.grad[1]


def test_sigmoid_gradient_is_beta_times_the_probability_of_the_wrong_order():
    chosen, rejected = torch.tensor([0.6], requires_grad=True), torch.tensor([-0.3], requires_grad=True)
    dpo.sigmoid(chosen, rejected, beta=2.0).sum().backward()
    assert chosen.grad.item() == pytest.approx(-2 * sigma(-1.8), rel=1e-5)
    assert rejected.grad.item() == pytest.approx(2 * sigma(-1.8), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_has_its_minimum_where_the_margin_is_half_of_one_over_beta(beta):
    chosen = torch.tensor([1 / (2 * beta) - 0.3], dtype=torch.float64, requires_grad=True)
    loss = dpo.ipo(chosen, torch.tensor([-0.3], dtype=torch.float64), beta=beta)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_sppo_has_its_minimum_at_opposite_log_ratios():
    chosen = torch.tensor([2.5], requires_grad=True)
    rejected = torch.tensor([-2.5], requires_grad=True)
    dpo.sppo_hard(chosen, rejected, beta=0.2).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == (0.0, 0.0)


def test_smoothed_sigmoid_has_its_minimum_at_the_log_odds_of_the_labels():
    chosen = torch.tensor([math.log(9.0) / 2], dtype=torch.float64, requires_grad=True)
    dpo.sigmoid(chosen, torch.zeros(1, dtype=torch.float64), beta=2.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


H_W = torch.tensor([0.6, -1.0, 3.0, 0.0], dtype=torch.float64)
H_L = torch.tensor([-0.3, 0.5, 1.0, 0.0], dtype=torch.float64)


def test_robust_without_noise_is_sigmoid():
    torch.testing.assert_close(
        dpo.robust(H_W, H_L, beta=0.7, label_smoothing=0.0), dpo.sigmoid(H_W, H_L, beta=0.7), rtol=0, atol=0
    )


def test_robust_is_unbiased_under_flipped_labels():
    as_given = dpo.robust(H_W, H_L, beta=0.7, label_smoothing=0.2)
    flipped = dpo.robust(H_L, H_W, beta=0.7, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * as_given + 0.2 * flipped, dpo.sigmoid(H_W, H_L, beta=0.7))


def test_labels_that_are_wrong_half_of_the_time_say_nothing():
    as_given = dpo.sigmoid(H_W, H_L, beta=0.7, label_smoothing=0.5)
    torch.testing.assert_close(as_given, dpo.sigmoid(H_L, H_W, beta=0.7, label_smoothing=0.5))


def test_exo_is_zero_where_the_policy_has_the_smoothed_labels():
    chosen = torch.tensor([math.log(9.0) / 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo.exo_pair(chosen, torch.zeros(1, dtype=torch.float64), beta=0.5, label_smoothing=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_bco_bounds_dpo_from_above():
    assert (dpo.bco_pair(H_W, H_L, beta=0.7) >= dpo.sigmoid(H_W, H_L, beta=0.7)).all()


def test_apo_goes_from_two_to_zero():
    far = torch.tensor([200.0])
    assert dpo.apo_zero(far, -far, beta=1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert dpo.apo_zero(-far, far, beta=1.0).item() == pytest.approx(2.0)
    assert dpo.apo_down(-far, -3 * far, beta=1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert dpo.apo_down(far, 3 * far, beta=1.0).item() == pytest.approx(2.0)


def test_apo_down_lowers_both_and_the_rejected_further():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo.apo_down(chosen, rejected, beta=0.4).sum().backward()
    # σ' = ¼ at 0: +β/4 from the chosen, ∓β/4 from the difference
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.1)


def test_discopop_tends_to_the_exponential_and_to_the_logistic_loss():
    chosen, rejected = torch.tensor([1.0, -1.0]), torch.zeros(2)
    loss = dpo.discopop(chosen, rejected, beta=1.0, discopop_tau=0.01)
    assert loss.tolist() == pytest.approx([math.exp(-1.0), softplus(1.0)], rel=1e-5)


def test_discopop_is_not_convex_and_pushes_the_wrong_way_around_zero():
    chosen = torch.zeros(1, requires_grad=True)
    dpo.discopop(chosen, torch.zeros(1), beta=1.0, discopop_tau=0.05).sum().backward()
    # ½ (−½) + ½ (−1) + m' (1 − ln 2), m' = 1 / (4 τ) = 5
    assert chosen.grad.item() == pytest.approx(-0.75 + 5 * (1 - LN2), rel=1e-5)


def test_discopop_is_finite_for_hopeless_pairs():
    chosen = torch.tensor([-5000.0], requires_grad=True)
    loss = dpo.discopop(chosen, torch.zeros(1), beta=1.0, discopop_tau=0.05)
    loss.sum().backward()
    assert (loss.item(), chosen.grad.item()) == (5000.0, -1.0)


def test_aot_compares_sorted_margins():
    margin, ref_margin = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.3, 0.1, -0.4])
    # sorted: −1, 0.5, 2 against −0.4, 0.1, 0.3
    expected = [softplus(0.6), softplus(-0.4), softplus(-1.7)]
    assert dpo.aot(margin, ref_margin, beta=1.0).tolist() == pytest.approx(expected, rel=1e-5)


def test_aot_unpaired_compares_sorted_log_ratios():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    expected = [0.9 * softplus(-2.0) + 0.1 * softplus(2.0), 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)]
    loss = dpo.aot_unpaired(chosen, rejected, beta=1.0, label_smoothing=0.1)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_aot_does_not_depend_on_the_order_of_pairs():
    for loss in (dpo.aot, dpo.aot_unpaired):
        torch.testing.assert_close(loss(H_W.flip(0), H_L, beta=0.7), loss(H_W, H_L.flip(0), beta=0.7))


PER_PAIR = [name for name, loss in LOSSES.items() if not loss.needs_full_batch]


@pytest.mark.parametrize("name", PER_PAIR)
def test_losses_that_do_not_couple_pairs_can_be_split(name):
    rows = [CHOSEN, REJECTED, [-2.0], [-0.1, -0.2]]
    refs = [REF_CHOSEN, REF_REJECTED, [-1.0], [-0.3, -0.2]]
    algorithm = DPO(loss_types=name, label_smoothing=SMOOTHED.get(name, 0.0))
    whole, _ = algorithm.loss(*make(rows, refs))
    parts = [algorithm.loss(*make(rows[i : i + 2], refs[i : i + 2]))[0] for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(parts))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = tuple((-torch.rand(3, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(3))
    count = len(VIEWS[loss.view](*DPO(loss_types="sigmoid").sides(*make(*PAIR))))
    options = {"beta": 0.7, "label_smoothing": 0.1, "discopop_tau": 0.5}
    options |= {"simpo_gamma": 0.5, "cpo_alpha": 0.3, "alphapo_alpha": 0.25}
    keywords = {k: options[k] for k in loss.options}
    assert torch.autograd.gradcheck(lambda *x: loss.formula(*x, **keywords), inputs[:count])


def test_gradient_reaches_scored_tokens_only():
    scores, batch = make([CHOSEN, REJECTED], [REF_CHOSEN, REF_REJECTED])
    logprobs = scores.logprobs.clone().requires_grad_()
    loss, _ = DPO(beta=2.0).loss(Scores(logprobs), batch)
    loss.sum().backward()
    slope = 2 * sigma(-1.8)
    expected = torch.tensor([[-slope, -slope, 0.0], [slope, slope, slope]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_metrics_are_rewards_and_log_probabilities_of_either_side():
    _, metrics = DPO(beta=2.0).loss(*make(*PAIR))
    assert {k: v.tolist() for k, v in metrics.items()} == {
        "rewards/chosen": [pytest.approx(1.2)],
        "rewards/rejected": [pytest.approx(-0.6)],
        "rewards/accuracies": [1.0],
        "rewards/margins": [pytest.approx(1.8)],
        "logps/chosen": [pytest.approx(-1.4)],
        "logps/rejected": [pytest.approx(-2.1)],
    }


def test_metrics_carry_no_gradient():
    scores, batch = make(*PAIR)
    _, metrics = DPO(loss_types=["sigmoid", "sft"]).loss(Scores(scores.logprobs.requires_grad_()), batch)
    assert not any(x.requires_grad for x in metrics.values())


def test_simpo_reports_length_normalised_rewards():
    _, metrics = DPO(loss_types="simpo", beta=2.0).loss(*make([[-1.0, -2.0], [-4.0]], None))
    assert metrics["rewards/chosen"].tolist() == pytest.approx([-3.0])
    assert metrics["rewards/rejected"].tolist() == pytest.approx([-8.0])
    assert metrics["logps/chosen"].tolist() == pytest.approx([-3.0])


def test_a_list_of_losses_is_their_weighted_sum():
    algorithm = DPO(loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5], beta=2.0)
    loss, metrics = algorithm.loss(*make(*PAIR))
    expected = 0.8 * softplus(-1.8) + 0.2 * (softplus(-1.2) + softplus(-0.6)) + 1.5 * 0.7
    assert loss.tolist() == pytest.approx([expected], rel=1e-5)
    assert metrics["loss/sft"].tolist() == pytest.approx([0.7])


def test_rpo_adds_the_likelihood_of_the_chosen_completion():
    loss, metrics = DPO(beta=2.0, rpo_alpha=0.5).loss(*make(*PAIR))
    assert loss.tolist() == pytest.approx([softplus(-1.8) + 0.5 * 0.7], rel=1e-5)
    assert metrics["loss/sigmoid"].tolist() == pytest.approx([softplus(-1.8)], rel=1e-5)
    assert not any(name.startswith("loss/") for name in DPO().loss(*make(*PAIR))[1])


def test_reference_free_compares_log_probabilities():
    algorithm = DPO(beta=2.0, reference_free=True)
    loss, _ = algorithm.loss(*make([CHOSEN, REJECTED], None))
    assert loss.tolist() == pytest.approx([softplus(-2 * 0.7)], rel=1e-5)
    assert not algorithm.needs_reference


def test_length_desensitising_weighs_the_tail():
    # the third token of the rejected: policy −0.9, reference −0.6; h_l = −0.1 + 0.1 + 0.5·(−0.3)
    loss, metrics = DPO(beta=2.0, ld_alpha=0.5).loss(*make(*PAIR))
    assert loss.tolist() == pytest.approx([softplus(-2 * (0.6 + 0.15))], rel=1e-5)
    assert metrics["logps/rejected"].tolist() == pytest.approx([-1.65])


def test_length_desensitising_with_one_is_plain():
    plain, _ = DPO().loss(*make(*PAIR))
    torch.testing.assert_close(DPO(ld_alpha=1.0).loss(*make(*PAIR))[0], plain)


def test_wpo_weighs_by_aligned_probabilities_without_gradient():
    collision = [[0.5, 0.5], [0.25, 0.25, 0.25]]
    scores, batch = make(*PAIR, collision=collision)
    logprobs = scores.logprobs.requires_grad_()
    loss, _ = DPO(beta=2.0, use_weighting=True).loss(Scores(logprobs, collision=scores.collision), batch)
    weight = math.exp(-0.7 + math.log(2)) * math.exp(-0.7 + math.log(4))
    assert loss.tolist() == pytest.approx([weight * softplus(-1.8)], rel=1e-5)
    loss.sum().backward()
    assert logprobs.grad[0, 0].item() == pytest.approx(-weight * 2 * sigma(-1.8), rel=1e-5)


def test_wpo_wants_the_collision_probability():
    assert DPO(use_weighting=True).wants == {"collision"}
    assert DPO().wants == frozenset()


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_replaces_the_log_ratio(divergence):
    scores_of = {
        "forward_kl": lambda h: 1 - math.exp(-h),
        "js_divergence": lambda h: LN2 - softplus(-h),
        "alpha_divergence": lambda h: 2 * (1 - math.exp(-0.5 * h)),
    }
    score = scores_of[divergence]
    loss, metrics = DPO(beta=2.0, f_divergence_type=divergence).loss(*make(*PAIR))
    assert loss.tolist() == pytest.approx([softplus(-2 * (score(0.6) - score(-0.3)))], rel=1e-5)
    assert metrics["rewards/chosen"].tolist() == pytest.approx([2 * score(0.6)], rel=1e-5)


def test_what_a_combination_needs():
    assert DPO(loss_types=["simpo", "sft"]).needs_reference is False
    assert DPO(loss_types=["simpo", "sigmoid"]).needs_reference is True
    assert DPO(loss_types=["sigmoid", "aot"]).needs_full_batch is True
    assert DPO(loss_types="orpo").needs_full_batch is False
    assert DPO(loss_types=["sigmoid", "hinge"], label_smoothing=0.1).needs_full_batch is False


def test_length_desensitising_with_zero_leaves_out_the_tail():
    """Of the rejected completion's three tokens, the two that the chosen one has as well."""
    loss, _ = DPO(ld_alpha=0.0, beta=2.0).loss(*make(*PAIR))
    assert loss.tolist() == pytest.approx([softplus(-2 * (0.6 - 0.0))], rel=1e-5)


def test_empty_completions_give_finite_numbers():
    scores, batch = make([[], [-1.0]], [[], [-1.0]])
    for name in LOSSES:
        loss, _ = DPO(loss_types=name, label_smoothing=SMOOTHED.get(name, 0.0)).loss(scores, batch)
        assert loss.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_types": "sigmod"}, r"Unknown loss_type 'sigmod'\. Did you mean 'sigmoid'.*Known: sigmoid, "),
        ({"f_divergence_type": "forward"}, "Unknown f_divergence_type 'forward'. Did you mean 'forward_kl'"),
        ({"loss_types": []}, "loss_types is empty"),
        ({"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 entries for 2 loss_types"),
        ({"beta": 0.0}, r"beta must be positive, got 0\.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5: .*below 0\.5"),
        ({"loss_weights": [0.0]}, "loss_weights: every weight is 0"),
        ({"loss_types": "exo_pair"}, "'exo_pair' needs label_smoothing > 0"),
        ({"loss_types": "hinge", "label_smoothing": 0.1}, r"used by none of loss_types=\['hinge'\]"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5: give 0 to 1"),
        ({"loss_types": "discopop", "discopop_tau": 0.0}, "discopop_tau=0.0: give more than 0"),
        ({"loss_types": "aot", "use_weighting": True}, r"use_weighting weighs single pairs, but \['aot'\] sort"),
        ({"loss_types": "apo_zero", "f_divergence_type": "forward_kl"}, r"not for \['apo_zero'\]"),
        ({"loss_types": "simpo", "f_divergence_type": "forward_kl"}, r"not for \['simpo'\]"),
        ({"reference_free": True, "f_divergence_type": "forward_kl"}, "with reference_free"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        DPO(**options)


def test_a_missing_reference_is_named():
    with pytest.raises(DataError, match="needs the signal 'ref_logprobs'"):
        DPO().loss(*make([CHOSEN, REJECTED], None))


def test_an_odd_number_of_completions_is_refused():
    with pytest.raises(DataError, match="even number of completions, got 3"):
        DPO(reference_free=True).loss(*make([CHOSEN, REJECTED, CHOSEN], None))
