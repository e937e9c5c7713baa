"""Where a figure was measured: hardware and versions, to be stored beside it."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions, for a device (the CPU by default)."""
    device = device or torch.device("cpu")
    return {
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
