"""From an ONNX file or a bundle to an engine, on a machine with or without a GPU.

Precision is a property of the graph: networks are strongly typed, and the data types that the parser found go
into the ledger. An engine that could not be run here has no error there, because nothing was measured.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vmkd_fx.deploy.bundle import add_engine, read_bundle
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.deploy.gpu import Gpu, find_gpu
from vmkd_fx.deploy.manifest import EngineInfo
from vmkd_fx.deploy.onnx_export import relative_error
from vmkd_fx.deploy.runtime import OnnxBackend
from vmkd_fx.deploy.tensorrt import Network, package
from vmkd_fx.errors import BuildError
from vmkd_fx.files import writing
from vmkd_fx.steps import Step
from vmkd_fx.target import COMPUTE_CAPABILITIES, ENGINE_KINDS, Profile, Target, parse_target

# RTX 30, 40 and 50: what a bundle is built for where there is no GPU to ask.
AHEAD_OF_TIME = (86, 89, 120)


def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    target: str | Target,
    profile: Profile | None = None,
    progress: bool = True,
) -> Step:
    """Build an engine from an ONNX file, or from a bundle and into it.

    Args:
        source: an ONNX file of `vx.export`, or a bundle.
        out: the engine file, default beside the ONNX file; for a bundle it must be None.
        target: as in "tensorrt-rtx:sm86,sm89". Without compute capabilities: this machine's GPU, or RTX 30,
            40 and 50 where there is none.
        profile: the batch sizes it takes; default 1 to 32, or the batch itself where it is fixed.
        progress: show how far the builder is.

    Raises:
        BuildError: the target takes no engine, the profile does not fit, or the builder refuses the graph.
        BundleError: the bundle is damaged.
        MissingExtraError: the extra `rtx` or `tensorrt` is not installed.
        OutputError: the engine cannot be written.
    """
    target = parse_target(target) if isinstance(target, str) else target
    if target.kind not in ENGINE_KINDS:
        raise BuildError(
            f"target {str(target)!r} needs no engine; engines are built for {', '.join(ENGINE_KINDS)}"
        )
    package(target.kind)  # a missing one is the first thing to say
    source = Path(source)
    if not source.is_dir():
        if not source.is_file():
            raise BuildError(f"there is no ONNX file and no bundle {source}")
        engine, info, step = build_engine(source, target, profile, progress)
        with writing(out if out is not None else source.with_suffix(f".{info.suffix}")) as temporary:
            temporary.write_bytes(engine)
        return step
    if out is not None:
        raise BuildError(f"{source} is a bundle and keeps its own engines: leave out {os.fspath(out)!r}")
    bundle = read_bundle(source)
    engine, info, step = build_engine(bundle.onnx, target, profile, progress)
    add_engine(bundle, engine, info, step)
    return step


def build_engine(
    onnx: Path, target: Target, profile: Profile | None, progress: bool
) -> tuple[bytes, EngineInfo, Step]:
    """The engine's bytes, what it was built for, and its row in the ledger."""
    gpu = find_gpu()
    target = _resolve(target, gpu)
    network = Network(target.kind, onnx)
    profile = _fit(profile, network)
    if 75 in target.compute_capabilities:
        _refuse_turing(network)
    ahead_of_time = target.compute_capabilities if target.kind == "tensorrt-rtx" else ()
    engine = network.build(profile, ahead_of_time, progress)
    info = EngineInfo(target, profile, network.package.version)
    error, checked = None, "built, not run"
    if gpu.compute_capability in target.compute_capabilities:
        error = _difference(engine, info, onnx, network)
        checked = f"run on sm{gpu.compute_capability} against ONNX Runtime, batch {profile.best}"
    layers = f"{network.layers} layers of {', '.join(network.precisions)}"
    detail = f"{target}; {info.built_with}, {profile}, {layers}, {len(engine):,} bytes"
    return engine, info, Step(name="engine", detail=detail, error=error, checked=checked)


def _resolve(target: Target, gpu: Gpu) -> Target:
    """The target with the compute capabilities that the engine will run on."""
    if target.compute_capabilities:
        return target
    here = gpu.compute_capability
    if target.kind == "tensorrt":
        if here is None:
            raise BuildError(
                f"TensorRT builds on the GPU that the engine runs on, and {gpu.why}; "
                "build there, or use the target 'tensorrt-rtx:sm89', which needs none"
            )
        return Target(target.kind, (here,))
    return Target(target.kind, (here,) if here in COMPUTE_CAPABILITIES else AHEAD_OF_TIME)


def _fit(profile: Profile | None, network: Network) -> Profile:
    """The profile, if the network's batch allows it."""
    batch = network.input_shape[0]
    if batch == -1:
        return profile or Profile()
    fixed = Profile(batch, batch, batch)
    if profile not in (None, fixed):
        raise BuildError(
            f"the graph has a fixed batch of {batch}, the profile asks for {profile}; "
            "export it with dynamic_batch=True, or leave the profile out"
        )
    return fixed


def _refuse_turing(network: Network) -> None:
    """SM75 gets no matrix products in float32 or bfloat16 from TensorRT-RTX 1.7, which says so late."""
    products = network.products("FLOAT", "BF16")
    if products:
        raise BuildError(
            f"sm75 takes matrix products in half precision only, and {len(products)} of this graph are in "
            f"another (the first is {products[0]!r}); leave sm75 out, or convert the model to half first"
        )


def _difference(engine: bytes, info: EngineInfo, onnx: Path, network: Network) -> float:
    """Relative difference between the engine and ONNX Runtime on random images."""
    shape = (info.profile.best, *network.input_shape[1:])
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    run = EngineBackend(info.target.kind, engine, info.profile)
    return relative_error([run(images)], [OnnxBackend(onnx)(images)])
