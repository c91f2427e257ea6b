"""Which versions a bundle was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from vmkd_fx import __version__

_PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of vmkd-fx, Python and those of the packages that are installed."""
    found = {"vmkd-fx": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
