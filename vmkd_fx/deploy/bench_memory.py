"""The memory of one side of a benchmark, in a process of its own.

    python -m vmkd_fx.deploy.bench_memory '{"side": "bundle", "path": "bundle", ...}'

A process knows its peak and not who caused it. So each side gets one, which notes its memory when the
packages are imported, then loads and runs the side alone. On a processor it is the peak of resident memory
above that (Linux says it); on a GPU what the device has less of in the end, for runtimes keep what they took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkd_fx.deploy.bench_sides import NEED_MODEL, images_of, side_named
from vmkd_fx.deploy.gpu import cuda
from vmkd_fx.errors import VmkdError

if TYPE_CHECKING:
    from vmkd_fx.graph.traced import TracedModule

ON_CPU = "peak of resident memory of a process with that side alone, compiling included, less its packages"
ON_GPU = "the GPU's memory that a process with that side alone holds after the runs, less the CUDA context"

_STATUS = Path("/proc/self/status")
_MINUTES = 30
_RUNS = 3


def can_measure(on_gpu: bool) -> bool:
    """Whether this system says what it takes."""
    return on_gpu or _STATUS.is_file()


def peak_memory(
    side: str,
    path: str,
    module: TracedModule | None,
    batches: Sequence[int],
    *,
    device: str,
    on_gpu: bool,
    threads: int,
) -> dict[int, int]:
    """Bytes by batch size, the sizes run in ascending order.

    Raises:
        VmkdError: the process failed; says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        task: dict[str, Any] = {
            "side": side,
            "path": path,
            "batches": sorted(batches),
            "device": device,
            "on_gpu": on_gpu and side != "onnxruntime",
            "threads": threads,
        }
        if side in NEED_MODEL:
            task["model"] = _written(module, Path(folder) / "model.pt")
        line = [sys.executable, "-m", __spec__.name, json.dumps(task)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=60 * _MINUTES)
        except subprocess.TimeoutExpired as error:
            raise VmkdError(f"a process for {side} took more than {_MINUTES} minutes") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise VmkdError(f"a process for {side} failed: {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return {int(batch): taken for batch, taken in found.items()}


def _written(module: TracedModule | None, path: Path) -> str:
    import torch

    try:
        torch.save(module, path)
    except Exception as error:  # what cannot be pickled has no family of errors
        raise VmkdError(f"the model cannot be handed to another process: {error}") from error
    return str(path)


def main() -> None:
    """Measure what the first argument says and print bytes by batch size."""
    task = json.loads(sys.argv[1])
    on_gpu, module = task["on_gpu"], None
    _import_packages(task["side"], on_gpu)
    base = _taken(on_gpu)
    if "model" in task:
        import torch

        # The file was written by the process that called this one, a moment ago.
        module = torch.load(task["model"], weights_only=False)
    call, _ = side_named(task["side"], task["path"], module, task["device"], on_gpu, task["threads"])
    found = {}
    for batch in task["batches"]:
        images = _images(task["path"], batch)
        for _ in range(_RUNS):
            call(images)
        found[batch] = max(0, _taken(on_gpu, peak=True) - base)
    print(json.dumps(found))


def _images(path: str, batch: int) -> Any:
    from vmkd_fx.deploy.bundle import open_bundle

    return images_of(open_bundle(path).manifest, batch)


def _import_packages(side: str, on_gpu: bool) -> None:
    """What the side stands on, and a CUDA context where it needs one."""
    if side in NEED_MODEL:
        import torch  # noqa: F401

        import vmkd_fx.graph.traced  # noqa: F401
    elif not on_gpu:
        import onnxruntime  # noqa: F401
    if on_gpu:
        cuda("cudaFree", 0)


def _taken(on_gpu: bool, *, peak: bool = False) -> int:
    """Bytes: now, or, on a processor, at the peak since the last time that was not asked for the peak."""
    if on_gpu:
        return -int(cuda("cudaMemGetInfo"))  # of what is free
    if not peak:
        _forget_peak()
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in _STATUS.read_text().splitlines():
        if line.startswith(wanted):
            return 1024 * int(line.split()[1])
    raise VmkdError(f"{_STATUS} does not say {wanted}")


def _forget_peak() -> None:
    """Let the peak begin anew; where the system forbids it, imports count as far as they took more."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main()
