"""MindSpore's own parallel compiler on a machine without an NPU.

The wheel for CPU refuses the semi-automatic parallel modes ("Invalid backend: CPU", or "Invalid communication backend:
CPU for semi_auto_parallel/auto_parallel mode"), but only because of the name of the device: the compiler that divides a
graph over devices is in it. ``pretend`` registers the name Ascend with an empty start function, which is all that
MindSpore asks for as long as nothing is run. What follows uses the rules for Ascend (shape inference, strategies,
communication operators) and stops before kernels are chosen. For a process of its own: it cannot be undone.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import mindspore as ms
from mindspore._c_expression import MSContext
from mindspore.ops.operations import comm_ops
from mindspore.parallel._auto_parallel_context import auto_parallel_context

LIBRARY = Path(ms.__file__).parent / "lib" / "libmindspore_core.so"


def pretend(folder: Path) -> None:
    """From here on graphs are compiled for Ascend, and never run. ``folder``: for a small compiled library."""
    os.environ["MS_DEV_PRECOMPILE_ONLY"] = "1"
    source, built = Path(__file__).with_suffix(".cc"), folder / "pretend_ascend.so"
    command = ["g++", "-shared", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=0", str(source), "-o", str(built)]
    subprocess.run([os.environ.get("CXX", command[0]), *command[1:]], check=True)
    ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built)).pretend(b"Ascend")
    ms.set_context(mode=ms.GRAPH_MODE)
    MSContext.get_instance().set_device_target_inner("Ascend")


def devices(count: int, rank: int, **settings) -> None:
    """The place of this process among ``count`` devices, for the graphs compiled from here on."""
    ms.reset_auto_parallel_context()
    ms.set_auto_parallel_context(device_num=count, global_rank=rank, **settings)
    # Operators ask Python for the size of their group; MindSpore's names of groups begin with it.
    comm_ops.get_group_size = lambda group: (
        count if group.endswith("world_group") else int(group.split("-")[0])
    )
    auto_parallel_context()._context_handle.set_hccl_test_avaible(True)  # the devices need not be there
