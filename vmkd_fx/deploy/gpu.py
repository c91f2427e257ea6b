"""The GPU of this machine, through CUDA's runtime API (the package cuda-bindings)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmkd_fx.errors import MissingExtraError, VmkdError
from vmkd_fx.extras import require


@dataclass(frozen=True)
class Gpu:
    """CUDA device 0.

    Attributes:
        compute_capability: times ten (89 is 8.9); None without a usable GPU.
        why: why there is none, in words; empty when there is one.
    """

    compute_capability: int | None
    why: str = ""


def find_gpu() -> Gpu:
    """The GPU that engines are built for and run on here, or the reason why there is none."""
    try:
        if cuda("cudaGetDeviceCount") == 0:
            return Gpu(None, "no GPU found")
        attribute = _runtime().cudaDeviceAttr
        major = cuda("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0)
        minor = cuda("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0)
    except MissingExtraError:
        return Gpu(None, "no GPU found: the package cuda-bindings, which looks for one, is not installed")
    except VmkdError as error:
        return Gpu(None, f"no GPU found ({error})")
    return Gpu(10 * major + minor)


def cuda(name: str, *arguments: Any) -> Any:
    """Call the CUDA runtime function `name` and return its one result, or None.

    Raises:
        VmkdError: CUDA reports an error.
        MissingExtraError: cuda-bindings is not installed.
    """
    runtime = _runtime()
    status, *results = getattr(runtime, name)(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        raise VmkdError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
    return results[0] if results else None


def _runtime() -> Any:
    return require("cuda.bindings.runtime", "rtx", "using the GPU")
