"""Preference losses without a reference model, by their common names: CPO, SimPO, AlphaPO, ORPO.

    CPO     −log σ(β [log π(y_w) − log π(y_l)]) − α log π(y_w) / |y_w|          arXiv:2401.08417
    SimPO   −log σ(β [m_w − m_l] − γ),   m = log π(y) / |y|                      arXiv:2405.14734
    ORPO    −m_w − β log σ(log odds(y_w) − log odds(y_l))                        arXiv:2403.07691

The trainer is `DPOTrainer`; only the options differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from trl.algorithms.dpo import DPO
from trl.errors import ConfigError
from trl.trainers.dpo import DPOConfig, DPOTrainer


@dataclass
class CPOConfig(DPOConfig):
    """Options of `CPOTrainer`."""

    ALIASES: ClassVar[dict[str, str]] = {**DPOConfig.ALIASES, "alpha": "alphapo_alpha"}

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """"sigmoid" (CPO), "hinge", "ipo", "simpo" or "alphapo"; `cpo_alpha` adds the likelihood of the chosen completion."""

    cpo_alpha: float | None = None
    """Weight of the chosen completion's negative log-likelihood per token. None: 0 for "alphapo", else 1. The SimPO paper
    has 0."""

    alphapo_alpha: float = 0.0
    """Shape of AlphaPO's reward (arXiv:2501.03884); with loss_type="simpo", whose reward has 0, another value makes it
    AlphaPO."""

    reference_free: Literal[True] = True
    """Always true: none of these losses has a reference."""

    def __post_init__(self) -> None:
        if self.loss_type == "simpo" and self.alphapo_alpha:  # SimPO is AlphaPO with α = 0
            self.cpo_alpha, self.loss_type = self.likelihood_weight, "alphapo"
        super().__post_init__()

    def make_algorithm(self) -> DPO:
        if self.rpo_alpha is not None:
            raise ConfigError(f"rpo_alpha={self.rpo_alpha} is called cpo_alpha here: set cpo_alpha instead.")
        own = {"cpo_alpha": self.likelihood_weight, "rpo_alpha": self.likelihood_weight or None}
        return self.check_not_split(DPO(loss_types=self.loss_type, **self.options() | own))

    @property
    def likelihood_weight(self) -> float:
        """`cpo_alpha`, or its default for this loss."""
        if self.cpo_alpha is not None:
            return self.cpo_alpha
        return 0.0 if self.loss_type == "alphapo" else 1.0


class CPOTrainer(DPOTrainer):
    """Contrastive preference optimisation, and SimPO with `loss_type="simpo"`. Arguments: see `DPOTrainer`."""

    config_class = CPOConfig
    args: CPOConfig


@dataclass
class ORPOConfig(DPOConfig):
    """Options of `ORPOTrainer`; `beta` is the paper's λ."""

    loss_type: Literal["orpo"] = "orpo"
    """Always "orpo"."""


class ORPOTrainer(DPOTrainer):
    """Odds-ratio preference optimisation: imitation and preference in one stage. Arguments: see `DPOTrainer`."""

    config_class = ORPOConfig
    args: ORPOConfig
