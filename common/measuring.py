"""What a device can do and what a run takes of it: time, peak memory, arithmetic."""

import gc
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
REPEATS = 5


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds of a call, and its peak memory in bytes beyond what was held before it; None where that is not known.

    On a GPU memory is what PyTorch allocated there, on the CPU the process's resident memory (Linux only).
    """
    gc.collect()
    before = _reset_peak(device)
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, None if before is None else _peak(device) - before


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    """A line of this process's memory status, in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peak_allocation(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that a call holds at a time, beyond those that were there before it.

    Unlike resident memory this does not depend on what the allocator keeps, and repeats exactly. Slows the call down.
    """
    if device.type == "cuda":
        before = _reset_peak(device)
        function()
        return _peak(device) - (before or 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def _cpu_attention_flops(query, key, value, *_args, out_shape=None, **_kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# The CPU's fused attention is not among the operations that PyTorch counts by itself.
_MORE_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of a call, attention included."""
    with FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS) as counter:
        function()
    return counter.get_total_flops()


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: a sum over a large buffer, the best of a few."""
    buffer = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return buffer.nbytes / min(timed(buffer.sum, device)[0] for _ in range(REPEATS))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(timed(lambda: matrix @ matrix, device)[0] for _ in range(REPEATS))


def peak_memory() -> int | None:
    """Largest resident size of this program so far, in bytes; None where the system does not tell (Windows).

    Linux hands `ru_maxrss` down from the parent process, so its own high-water mark is read where there is one.
    """
    if STATUS.is_file():
        return _resident("VmHWM")
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
