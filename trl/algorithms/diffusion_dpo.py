"""DPO for diffusion models: the likelihood of a picture is bounded by how well its noise is predicted.

    L = −log σ(−β/2 [(e_w − e_w,ref) − (e_l − e_l,ref)]),     e = mean (output − target)²

Wallace et al. 2023, Diffusion-DPO, arXiv:2311.12908, Eq. 14, with βTω(λ_t) as one constant β: 2000 to 5000. Both pictures of
a pair are noised alike: the same noise, the same level. The target is what the model was trained to say: the noise, v, or
the velocity of flow matching.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trl.types import Metrics


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over dimensions of the squared error, `[M]` float32, of `output` and `target` `[M,…]`."""
    if output.shape != target.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} have to be of one shape.")
    return (output.float() - target.float()).square().flatten(1).mean(1)


def diffusion_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Loss `[P]` and metrics `[P]` of the errors `[P]` of the policy and of the reference; ln 2 where they are the same.

    A picture's implicit reward is β/2 (e_ref − e): how much better the policy explains it than the reference.
    """
    if not chosen.shape == rejected.shape == ref_chosen.shape == ref_rejected.shape or chosen.dim() != 1:
        raise ValueError("errors have to be four tensors of one shape [P].")
    reward_w, reward_l = beta / 2 * (ref_chosen - chosen), beta / 2 * (ref_rejected - rejected)
    margin = reward_w - reward_l
    metrics = {
        "rewards/chosen": reward_w.detach(),
        "rewards/rejected": reward_l.detach(),
        "rewards/margins": margin.detach(),
        "rewards/accuracies": (margin > 0).float(),
    }
    return -F.logsigmoid(margin), metrics
