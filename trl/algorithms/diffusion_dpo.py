"""DPO for diffusion models: the denoising error of a picture stands in for its negative log-likelihood, which it bounds.

    L = −log σ(−β/2 [(e_w − e_w,ref) − (e_l − e_l,ref)]),     e = mean (output − target)²

Wallace et al. 2023, Diffusion-DPO, arXiv:2311.12908, Eq. 14, whose βTω(λ_t) is one constant, β/2 here as in the authors'
code; since e is a mean over dimensions, β is 2000 to 5000. Both pictures of a pair get the same noise at the same noise
level. The target is what the model was trained to predict: the noise ε, v, or the velocity of flow matching.
"""

from __future__ import annotations

from torch import Tensor

from trl.algorithms.pairs import reward_metrics
from trl.algorithms.reference_free import logistic
from trl.ops.shapes import shapes
from trl.types import Metrics


@shapes(output="M ...", target="M ...")
def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error between `output` and `target` `[M,…]`, averaged over all other dimensions: `[M]` float32."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


@shapes(chosen="P", rejected="P", ref_chosen="P", ref_rejected="P")
def diffusion_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Loss `[P]` and metrics `[P]`, from the errors e `[P]` of policy and reference; the loss is ln 2 where these are equal.

    A picture's implicit reward is β/2 (e_ref − e): how much better the policy explains it than the reference.
    """
    reward_w, reward_l = beta / 2 * (ref_chosen - chosen), beta / 2 * (ref_rejected - rejected)
    return logistic(reward_w - reward_l), reward_metrics(reward_w, reward_l)
