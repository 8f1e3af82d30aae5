"""bnbref's kernels in the real bitsandbytes, for devices that it has none for.

    BNBREF_BACKEND_FOR=mps,npu python ...           `import bitsandbytes` then calls bnbref's kernels on these devices

An entry point of the group `bitsandbytes.backends`, which bitsandbytes calls at the end of its import. Without the variable it
does nothing: a kernel that is registered cannot be taken back. A kernel that bitsandbytes has for that device is replaced.
"""

import os

import torch
from torch import library

SWITCH = "BNBREF_BACKEND_FOR"


def register() -> None:
    """Register every kernel for the devices in `BNBREF_BACKEND_FOR`. ValueError if one of them is no type of device."""
    devices = [name.strip() for name in os.environ.get(SWITCH, "").split(",") if name.strip()]
    for name in devices:
        try:
            indexed = torch.device(name).index is not None
        except RuntimeError as error:
            raise ValueError(f"{SWITCH} must name types of devices, like 'cpu,mps', got {name!r}") from error
        if indexed:
            raise ValueError(f"{SWITCH} must name types of devices, like 'cpu,mps', got {name!r}")
    if not devices:
        return
    from bnbref.integrations.bitsandbytes.ops import KERNELS

    for name, kernel in KERNELS.items():
        library.register_kernel(f"bitsandbytes::{name}", devices, kernel)
