"""Options for GPUs that need none to be checked."""

import pytest

from trl.errors import ConfigError
from trl.trainers.config import liger_layers


def test_ligers_layers_are_used_and_the_head_is_left_as_it_is():
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger_layers(None) == losses
    assert liger_layers({"rope": False}) == {"rope": False} | losses
    assert liger_layers('{"swiglu": false}') == {"swiglu": False} | losses


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_ligers_losses_are_refused(name):
    with pytest.raises(ConfigError, match=f"liger_kernel_config={{'{name}': True}}"):
        liger_layers({name: True})
