"""vLLM's own reader of packed weights on what `NCCLTransfer` sends, without NCCL. Run by the Python of an environment with vLLM.

python unpack_weights.py
"""

from __future__ import annotations

import base64
import contextlib
from types import SimpleNamespace

import torch
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

from tests.vllm.support import llama
from trl.models.gathering import gathered_parameters
from trl.rollouts.nccl_transfer import join_info
from trl.rollouts.packing import packed, update_info, weights_meta

BUFFER = 100_000


def main() -> None:
    model = llama(0).to(torch.bfloat16)
    metas = weights_meta(model)
    buffers = packed(gathered_parameters(model), metas, BUFFER, torch.device("cpu"))
    init = NCCLWeightTransferInitInfo(**join_info(base64.b64encode(bytes(128)).decode(), 2, BUFFER))
    info = NCCLWeightTransferUpdateInfo(**update_info(metas))
    found = {}

    # what the reader wants of a GPU
    stream = SimpleNamespace(synchronize=lambda: None)
    packed_tensor._get_streams = lambda device, count: (stream,) * count
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.accelerator.current_device_index = lambda: 0

    packed_tensor.packed_nccl_broadcast_consumer(
        iterator=iter(
            (name, (shape, getattr(torch, dtype)))
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
        ),
        group=SimpleNamespace(broadcast=lambda tensor, src: tensor.copy_(next(buffers))),
        src=0,
        post_unpack_func=lambda weights: found.update({name: tensor.clone() for name, tensor in weights}),
        buffer_size_bytes=init.packed_buffer_size_bytes,
        num_buffers=init.packed_num_buffers,
        device="cpu",
    )
    assert next(buffers, None) is None
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


if __name__ == "__main__":
    main()
