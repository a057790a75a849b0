"""DPO for diffusion models: the likelihood of a picture is bounded by how well its noise is predicted.

    L = −log σ(−β/2 [(e_w − e_w,ref) − (e_l − e_l,ref)]),     e = mean (output − target)²

Wallace et al. 2023, Diffusion-DPO, arXiv:2311.12908, Eq. 14, whose βTω(λ_t) is one constant, β/2 here as in the authors'
code; with the mean over dimensions, β is 2000 to 5000. Both pictures of a pair are noised alike: the same noise, the same
level. The target is what the model was trained to say: the noise, v, or the velocity of flow matching.
"""

from __future__ import annotations

from torch import Tensor

from trl.algorithms.pairs import reward_metrics
from trl.algorithms.reference_free import logistic
from trl.ops.shapes import shapes
from trl.types import Metrics


@shapes(output="M ...", target="M ...")
def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over dimensions of the squared error, `[M]` float32, of `output` and `target` `[M,…]`."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


@shapes(chosen="P", rejected="P", ref_chosen="P", ref_rejected="P")
def diffusion_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Loss `[P]` and metrics `[P]` of the errors `[P]` of the policy and of the reference; ln 2 where they are the same.

    A picture's implicit reward is β/2 (e_ref − e): how much better the policy explains it than the reference.
    """
    reward_w, reward_l = beta / 2 * (ref_chosen - chosen), beta / 2 * (ref_rejected - rejected)
    return logistic(reward_w - reward_l), reward_metrics(reward_w, reward_l)
