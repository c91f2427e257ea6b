"""The machine that something was measured on, and what makes its figures less sure than they could be."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

_QUERY = ("name", "driver_version", "clocks.sm")
_STILL = 30  # MHz: locked clocks stay within one step


def cores() -> int:
    """How many this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def usual_threads() -> int:
    """What OMP_NUM_THREADS says, as torch takes it, or one a core."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else cores()


def machine() -> dict[str, str]:
    """System, processor and, where nvidia-smi finds one, GPU; nothing that names the machine."""
    found = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(cores()),
    }
    gpu = _ask_gpu()
    if gpu:
        found |= {"gpu": gpu[0], "driver": gpu[1]}
    return found


def clock() -> int | None:
    """The GPU's clock now, in MHz; None where nvidia-smi does not say."""
    gpu = _ask_gpu()
    return int(gpu[2]) if gpu and gpu[2].isdecimal() else None


def hints(on_gpu: bool, clocks: list[int], torch_threads: int = 1) -> tuple[str, ...]:
    """What to do for surer figures.

    Args:
        on_gpu: whether anything ran there.
        clocks: of the GPU while it was busy, in MHz, as often as it said.
        torch_threads: that torch computed with on the processor.
    """
    said = []
    if on_gpu and not clocks:
        said.append(
            "the GPU's clock could not be read; lock it (Jetson: jetson_clocks) for times that repeat"
        )
    elif on_gpu and max(clocks) - min(clocks) > _STILL:
        said.append(
            f"the GPU's clock went from {min(clocks)} to {max(clocks)} MHz meanwhile, so it is not locked; "
            "lock it (nvidia-smi --lock-gpu-clocks=MHZ, on Jetson jetson_clocks) for times that repeat"
        )
    governor = _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    if governor and governor != "performance":
        said.append(
            f"the processor's clock follows the governor {governor!r}; with 'performance' times repeat better"
        )
    if torch_threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        said.append(
            "torch's threads wait busily after each turn, which slows the next side and, on a busy machine, "
            "torch itself; OMP_WAIT_POLICY=PASSIVE in the environment ends that"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores() + 1:
        said.append(f"the machine was busy with other work (load {load:.1f} on {cores()} core(s))")
    return tuple(said)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _ask_gpu() -> list[str]:
    """The first GPU's answers to `_QUERY`, or nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    answers = [answer.strip() for answer in done.stdout.partition("\n")[0].split(",")]
    return answers if len(answers) == len(_QUERY) else []


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
