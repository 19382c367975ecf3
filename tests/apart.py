# SPDX-License-Identifier: Apache-2.0
"""torch's device "apart": memory that the processor cannot touch, and the CPU's kernels on copies of it (apart.cpp).

It stands for an accelerator on machines that have none: what takes its memory for the host's ends the process.
"""

import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


COMPILER = shutil.which("c++")


def compile_apart(folder: Path) -> Path:
    """Build its library there."""
    assert COMPILER is not None
    home, library = Path(torch.__file__).parent, folder / "apart.so"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    where = [f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    source = str(Path(__file__).with_suffix(".cpp"))
    options = ["-O0", "-std=c++20", "-fPIC", "-shared", abi, *where]
    subprocess.run([COMPILER, *options, source, "-o", str(library), "-ltorch_cpu", "-lc10"], check=True)
    return library


def open_apart(library: Path) -> None:
    """Make the device known to this process."""
    if hasattr(torch, "apart"):
        return
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("apart")
    module: Any = types.ModuleType("torch.apart")
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    # Draws are the CPU's. torch's pipelining keeps the device's all the same.
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.get_rng_state, module.set_rng_state = lambda device: torch.empty(0), lambda state, device: None
    module.library = library
    torch._register_device_module("apart", module)  # type: ignore[no-untyped-call]


def library() -> Path:
    """That of the device which this process knows."""
    found: Path = torch.apart.library  # type: ignore[attr-defined]
    return found


def on_apart(library: Path, function: Callable[..., T], *given: Any) -> T:
    """`function(*given)` in a process that knows the device from then on."""
    open_apart(library)
    return function(*given)
