"""Device: where tensors are, by the name that a user gives."""

from __future__ import annotations

import torch


def check_device(name: str) -> torch.device:
    """The device of this name, if this machine has it.

    Raises:
        ValueError: no name of a device, or one that torch does not see here; the message has those that it sees.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device is not None and (device.index or 0) < counts.get(device.type, 0):
        return device
    here = ", ".join(
        kind if number == 1 else f"{kind}:0 ... {kind}:{number - 1}" for kind, number in counts.items() if number
    )
    built = "" if torch.version.cuda or not name.startswith("cuda") else "; this torch is built without CUDA"
    raise ValueError(f"device {name!r}: this machine has {here}{built}")
