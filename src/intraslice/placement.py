"""Devices and dtypes are decided here and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from intraslice.errors import RecipeError

T = TypeVar("T")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype for "float32", "bfloat16" or "float16"."""
    if name not in _DTYPES:
        raise RecipeError(f"dtype {name!r} is unknown; use one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device to compute on: the accelerator when there is one, unless `name` says otherwise.

    Raises:
        RecipeError: the device does not exist on this machine.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name!r} is not a torch device; use auto, cpu or cuda:0.") from error
    if device.type == "cpu" or (accelerator is not None and device.type == accelerator.type):
        return device
    present = accelerator.type if accelerator is not None else "none"
    raise RecipeError(f"device {name!r} is not available (accelerator here: {present}); use --device auto.")


def accelerator_index(device: torch.device) -> int | None:
    """Return which of the accelerators a device is, the first one 0; None for a CPU."""
    if device.type == "cpu" or device.index is not None:
        return device.index
    # The other one is its name in older releases of torch.
    current = getattr(torch.accelerator, "current_device_index", None) or torch.accelerator.current_device_idx
    return current()


def with_float64(device: torch.device) -> torch.device:
    """Return the device itself where it computes in float64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def for_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in its own dtype where it can be turned into float64: a copy on the CPU, or itself."""
    return tensor.to(with_float64(tensor.device))


def memory_bytes(device: torch.device) -> int | None:
    """Return all the memory of an accelerator; None for a CPU, and where the system does not say."""
    found = None if device.type == "cpu" else _memory_info(device)
    return None if found is None else found[1]


def _memory_info(device: torch.device) -> tuple[int, int] | None:
    """Return the free bytes of an accelerator, and all of them."""
    # Not in the oldest torch that is supported.
    ask = getattr(torch.accelerator, "get_memory_info", None)
    return None if ask is None else ask(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many threads of the CPU in the block: sums are rounded differently with another number."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Placement:
    """Where tensors live and in which precision the work is done.

    Attributes:
        device: where layers run.
        compute_dtype: dtype of weights and activations while layers run.
        save_dtype: dtype of the stored weights.
        stat_dtype: dtype in which sums over tokens are kept; solves are always float64 on the CPU.
    """

    device: torch.device
    compute_dtype: torch.dtype
    save_dtype: torch.dtype
    stat_dtype: torch.dtype

    @property
    def stat_device(self) -> torch.device:
        """Where sums over tokens are kept."""
        return with_float64(self.device)

    @classmethod
    def choose(cls, device: str, dtype: str, stored: torch.dtype) -> Placement:
        """Decide for a checkpoint whose weights are stored in `stored`.

        A CPU computes in float32 whatever the checkpoint stores: half precision is slower there and loses digits
        that the statistics need. An accelerator computes in the stored dtype.
        """
        chosen = choose_device(device)
        save = stored if dtype == "auto" else dtype_from_name(dtype)
        on_cpu = chosen.type == "cpu"
        # float64 checkpoints (tests) stay float64.
        compute = stored if (not on_cpu or stored == torch.float64) else torch.float32
        return cls(chosen, compute, save, torch.float64)

    def reset_peak(self) -> None:
        """Start a new measurement of accelerator memory."""
        if self.device.type != "cpu":
            _memory(self.device).reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self) -> int:
        """Return the peak memory: of the process on a CPU, of the allocator on an accelerator."""
        if self.device.type != "cpu":
            return int(_memory(self.device).max_memory_allocated(self.device))
        return peak_resident_bytes()

    def free_bytes(self) -> int | None:
        """Return the memory that is free for tensors; None where the system does not say."""
        if self.device.type != "cpu":
            found = _memory_info(self.device)
            return None if found is None else found[0]
        meminfo = Path("/proc/meminfo")
        lines = meminfo.read_text().splitlines() if meminfo.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

    def synchronize(self) -> None:
        """Wait for the accelerator, so that wall-clock times mean something."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def autocast(self, rounds: bool) -> AbstractContextManager[Any]:
        """Within the block, let products of float32 tensors be taken in bfloat16 if `rounds` says so."""
        return torch.autocast(self.device.type, torch.bfloat16) if rounds else nullcontext()

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Return the seconds that `work` takes, and what it returns.

        On an accelerator the time between two events on its stream, with nothing else waiting there; on a CPU
        wall-clock time.
        """
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result
        self.synchronize()
        stream = torch.accelerator.current_stream(self.device)
        begin, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        begin.record(stream)
        result = work()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1000, result  # events count in milliseconds


def _memory(device: torch.device) -> Any:
    """Return the module that counts the memory of an accelerator: its own, where torch has none for all of them yet."""
    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else torch.get_device_module(device)


@contextmanager
def matmul_precision(fast: bool) -> Iterator[None]:
    """Within the block, let float32 products be rounded to bfloat16 where the processor is faster that way.

    Sums stay float32. On a CPU with bfloat16 matrix units this halves the time; elsewhere nothing changes.

    Args:
        fast: False keeps float32 products exact.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_resident_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    # On Linux ru_maxrss of a child starts at what its parent used at the fork; VmHWM starts anew.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Each of the two exists only on its own systems.
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
