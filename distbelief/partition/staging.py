# SPDX-License-Identifier: Apache-2.0
"""A process group for stages that share an accelerator: nccl refuses that, and gloo moves host memory only."""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist


@final
class StagingGroup(dist.ProcessGroup):
    """What torch's pipelining asks of a group, for tensors of any device, over a gloo group and host memory."""

    def __init__(self, gloo: Any, index: int, size: int) -> None:
        super().__init__(index, size)  # type: ignore[call-arg]
        self._gloo = gloo

    def getBackendName(self) -> str:
        """Named after what it talks over."""
        return "staged_gloo"

    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int) -> Any:
        """Start sending one tensor; it may be changed as soon as this returns."""
        (tensor,) = tensors
        staged = host_memory(tensor).copy_(tensor.detach())  # awaited
        return _Staged(self._gloo.send([staged], to, tag), staged)

    def recv(self, tensors: Sequence[torch.Tensor], sender: int, tag: int) -> Any:
        """Start receiving one tensor; it is filled when the work has been waited for."""
        (tensor,) = tensors
        landing = host_memory(tensor)
        return _Staged(self._gloo.recv([landing], sender, tag), landing, tensor.detach())

    def shutdown(self) -> None:
        """Leave; who waits for this partition learns of it."""
        self._gloo.shutdown()


@final
class _Staged(dist.Work):
    """A transfer between host buffers, and the copy to the device behind it."""

    def __init__(self, work: Any, staged: torch.Tensor, arrival: torch.Tensor | None = None) -> None:
        super().__init__()
        self._work, self._staged, self._arrival = work, staged, arrival

    def wait(self, timeout: Any = None) -> bool:
        """Wait for the transfer, at most as long as the group allows. Raises RuntimeError."""
        self._work.wait()
        if self._arrival is not None:
            self._arrival.copy_(self._staged, non_blocking=True)
            self._arrival = None
        return True


def host_memory(like: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor, page-locked for one of CUDA's."""
    return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)
