"""The GPU of this machine, through CUDA's runtime API (the package cuda-bindings).

Which GPU it is, the driver alone can say: a board that only builds engines needs no more than TensorRT.
"""

from __future__ import annotations

import ctypes
import sys
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
        return _ask_driver()
    except VmkdError as error:
        return Gpu(None, f"no GPU found ({error})")
    return Gpu(10 * major + minor)


def _ask_driver() -> Gpu:
    """The same from the driver's own library."""
    major_of_device, minor_of_device = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Gpu(None, "no GPU found: neither its driver nor the package cuda-bindings is installed")
    device, count, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count)))
    if any(calls) or count.value == 0 or driver.cuDeviceGet(ctypes.byref(device), 0):
        return Gpu(None, "no GPU found: its driver sees none")
    capability = []
    for attribute in (major_of_device, minor_of_device):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return Gpu(None, "no GPU found: its driver does not say which one it is")
        capability.append(number.value)
    return Gpu(10 * capability[0] + capability[1])


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
