"""What takes turns in a benchmark: the bundle itself, ONNX Runtime, the model in torch, eager and compiled.

Every side goes from the arrays that the bundle's graph takes to logits in the processor's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.deploy.bench_report import BUNDLE, Setup
from vmkd_fx.deploy.manifest import Manifest
from vmkd_fx.deploy.onnx_export import random_images
from vmkd_fx.deploy.runtime import Runner, load

if TYPE_CHECKING:
    import torch

    from vmkd_fx.graph.traced import TracedModule

RIVALS = ("torch", "compile", "onnxruntime")
NEED_MODEL = ("torch", "compile")

Call = Callable[[NDArray[Any]], NDArray[np.float32]]

_OUT = "not in it, images come as arrays"
_FRAMES = "bytes are cast and normalised, the rest is not in it"


def images_of(manifest: Manifest, batch: int) -> NDArray[Any]:
    """Random images as the bundle's graph takes them."""
    size, frames = manifest.preprocess.input_size, manifest.frames
    shape = size if frames is None else frames.shape(size)
    return random_images(frames is not None, (batch, *shape))


def runner_side(path: str, device: str, threads: int) -> tuple[Call, Runner]:
    """The bundle in its own runtime.

    Args:
        device: "auto", "cpu" or "gpu", as for `load`.
        threads: that ONNX Runtime computes with. They do not spin when idle, for that would take the core
            from the side whose turn it is.
    """
    runner = load(path, device=device, threads=threads, spin=False)
    return runner, runner


def runner_setup(runner: Runner, machine: dict[str, str], threads: int, warm_up: str) -> Setup:
    """What a runner is and what its times include."""
    on_gpu = runs_on_gpu(runner)
    manifest = runner.bundle.manifest
    return Setup(
        runtime=runner.backend,
        device=machine.get("gpu", "GPU") if on_gpu else machine["processor"],
        threads=None if on_gpu else threads,
        precision=manifest.precision,
        transfers="both ways, through page-locked memory" if on_gpu else "none",
        cuda_graphs="yes, where the package can record the engine" if on_gpu else "none",
        preparation=_preparation(manifest),
        warm_up=warm_up,
    )


def torch_side(
    module: TracedModule, manifest: Manifest, *, compiled: bool, on_gpu: bool, threads: int
) -> Call:
    """The stripped model, whose parameters it may move."""
    import torch

    device = torch.device("cuda" if on_gpu else "cpu")
    model = _behind_frames(module, manifest).to(device).eval()
    run: Any = model
    if compiled:
        torch.compiler.reset()  # what was compiled before counts towards torch's limit
        # A graph break would leave part of it eager without a word.
        run = torch.compile(
            model, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else "default"
        )
    half = _half(manifest) if on_gpu else None

    def call(images: NDArray[Any]) -> NDArray[np.float32]:
        torch.set_num_threads(threads)
        precision = nullcontext() if half is None else torch.autocast("cuda", dtype=half)
        with torch.inference_mode(), precision:
            logits: torch.Tensor = run(torch.from_numpy(images).to(device))
            return logits.float().cpu().numpy()

    return call


def torch_setup(
    manifest: Manifest,
    machine: dict[str, str],
    *,
    compiled: bool,
    on_gpu: bool,
    threads: int,
    warm_up: str,
) -> Setup:
    """What a side in torch is and what its times include."""
    import torch

    half = _half(manifest) if on_gpu else None
    mode = "reduce-overhead" if on_gpu else "default"
    return Setup(
        runtime=f"torch {torch.__version__}, " + (f"compiled ({mode})" if compiled else "eager"),
        device=machine.get("gpu", "GPU") if on_gpu else machine["processor"],
        threads=None if on_gpu else threads,
        precision=f"float32, products in the precision {torch.get_float32_matmul_precision()!r}"
        if half is None
        else f"autocast to {str(half).removeprefix('torch.')}",
        transfers="both ways, from pageable memory" if on_gpu else "none",
        cuda_graphs="yes" if on_gpu and compiled else "none",
        preparation=_preparation(manifest),
        warm_up=warm_up,
    )


def runs_on_gpu(runner: Runner) -> bool:
    """Whether an engine runs the bundle."""
    return not runner.backend.startswith("ONNX Runtime")


def side_named(
    name: str, path: str, module: TracedModule | None, device: str, on_gpu: bool, threads: int
) -> tuple[Call, Runner | None]:
    """The side of that name, ready to be called; with its runner, where it has one."""
    if name == BUNDLE:
        return runner_side(path, device, threads)
    if name == "onnxruntime":
        return runner_side(path, "cpu", threads)
    assert module is not None  # sides that need a model are refused without one
    from vmkd_fx.deploy.bundle import open_bundle

    manifest = open_bundle(path).manifest
    compiled = name == "compile"
    return torch_side(module, manifest, compiled=compiled, on_gpu=on_gpu, threads=threads), None


def _preparation(manifest: Manifest) -> str:
    return _OUT if manifest.frames is None else _FRAMES


def _half(manifest: Manifest) -> torch.dtype | None:
    """What torch computes in beside an engine of less than float32."""
    import torch

    if manifest.precision == "fp32":
        return None
    return torch.bfloat16 if manifest.precision == "bf16" else torch.float16


def _behind_frames(module: TracedModule, manifest: Manifest) -> torch.nn.Module:
    """The model as it takes what the bundle's graph takes: behind a normalisation of bytes, if need be."""
    import torch
    from torch import nn

    from vmkd_fx.graph.values import reference_tensor

    frames, like = manifest.frames, reference_tensor(module)
    if frames is None or module.info.frames is not None:
        return module
    last = frames.layout == "nhwc"
    mean, std = (
        255 * torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)
        for values in (frames.mean, frames.std)
    )

    class Normalised(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = module
            self.register_buffer("mean", mean.to(like))
            self.register_buffer("std", std.to(like))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            planes = images.permute(0, 3, 1, 2) if last else images
            logits: torch.Tensor = self.model((planes.to(like.dtype) - self.mean) / self.std)
            return logits

    return Normalised()
