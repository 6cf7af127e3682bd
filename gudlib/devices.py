"""Where torch computes: the one place that decides it."""

import torch


def default() -> torch.device:
    """CUDA if there is any, else the CPU; not `mps`, which has no float64, the type of times, schedules and states."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> str:
    """That networks train in on the default device: `bf16` where the hardware has it, else `no` (float32)."""
    if default().type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
