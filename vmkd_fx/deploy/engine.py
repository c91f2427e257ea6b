"""From an ONNX file or a bundle to an engine, on a machine with or without a GPU.

Precision is a property of the graph: networks are strongly typed, and the data types that the parser found go
into the ledger. An engine that could not be run here has no error there, because nothing was measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vmkd_fx.deploy.builder.hazards import could_meet, met, refusals, refuse
from vmkd_fx.deploy.builder.options import AMPERE_PLUS, BuildOptions, refuse_lacking
from vmkd_fx.deploy.bundle import is_bundle, read_bundle
from vmkd_fx.deploy.bundle_write import add_engine
from vmkd_fx.deploy.engine_runtime import EngineBackend
from vmkd_fx.deploy.gpu import Gpu, find_gpu
from vmkd_fx.deploy.manifest import ONNX, EngineInfo
from vmkd_fx.deploy.manifest import Hazard as ManifestHazard
from vmkd_fx.deploy.onnx_export import random_images, relative_error
from vmkd_fx.deploy.onnx_nodes import read_graph
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.readback import hold_to, read_layers
from vmkd_fx.deploy.runtime import OnnxBackend
from vmkd_fx.deploy.tensorrt import TITLES, Network, package
from vmkd_fx.errors import BuildError, MissingExtraError
from vmkd_fx.files import check_writable, writing
from vmkd_fx.steps import Step
from vmkd_fx.target import COMPUTE_CAPABILITIES, ENGINE_KINDS, Profile, Target, parse_target

# RTX 30, 40 and 50: what a bundle is built for where there is no GPU to ask.
AHEAD_OF_TIME = (86, 89, 120)


def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    target: str | Target,
    profile: Profile | Sequence[Profile] | None = None,
    options: BuildOptions | None = None,
    progress: bool = True,
) -> Step:
    """Build an engine from an ONNX file, or from a bundle and into it.

    Args:
        source: an ONNX file of `vx.export`, or a bundle.
        out: the engine file, default beside the ONNX file; for a bundle it must be None.
        target: as in "tensorrt-rtx:sm86,sm89". Without compute capabilities: this machine's GPU, or RTX 30,
            40 and 50 where there is none.
        profile: the batch sizes it takes; default 1 to 32, or the batch itself where it is fixed. Several are
            several optimisation profiles, each tuned for its own batch sizes.
        options: what else the builder is asked for.
        progress: show how far the builder is.

    Raises:
        BuildError: the target takes no engine, the profile does not fit, the package does not have an option,
            the graph would meet a known defect of the package, the builder refuses it, or makes something
            else of it than the precision that the bundle was asked to have.
        BundleError: the bundle is damaged.
        MissingExtraError: the extra `rtx` or `tensorrt` is not installed.
        OutputError: the engine cannot be written.
    """
    target = parse_target(target) if isinstance(target, str) else target
    if target.kind not in ENGINE_KINDS:
        raise BuildError(
            f"target {str(target)!r} needs no engine; engines are built for {', '.join(ENGINE_KINDS)}"
        )
    check_target(target, options)  # a missing package is the first thing to say
    source = Path(source)
    if not is_bundle(source):
        if not source.is_file():
            raise BuildError(f"there is no ONNX file and no bundle {source}")
        check_writable(out if out is not None else source)
        engine, info, step = build_engine(source, target, profile, progress, options)
        with writing(out if out is not None else source.with_suffix(f".{info.suffix}")) as temporary:
            temporary.write_bytes(engine)
        return step
    if out is not None:
        raise BuildError(f"{source} is a bundle and keeps its own engines: leave out {os.fspath(out)!r}")
    bundle = read_bundle(source)
    asked = Asked(bundle.manifest.precision, bundle.manifest.kept)
    with bundle.unpacked() as folder:
        engine, info, step = build_engine(folder / ONNX, target, profile, progress, options, asked)
    add_engine(bundle, engine, info, step)
    return step


def build_engine(
    onnx: Path,
    target: Target,
    profile: Profile | Sequence[Profile] | None,
    progress: bool,
    options: BuildOptions | None = None,
    asked: Asked | None = None,
) -> tuple[bytes, EngineInfo, Step]:
    """The engine's bytes, what it was built for, and its row in the ledger.

    What the parser made of the graph is held to `asked`, where that is given, before anything is built.

    The row's `refused` are the nodes that may meet a known defect of the package.
    """
    options = options or BuildOptions()
    target, gpu = check_target(target, options)
    builder = package(target.kind)
    hazards = met(read_graph(onnx), target.kind, builder.numbers, target.compute_capabilities)
    refuse(hazards, builder.version)
    network = Network(target.kind, onnx)
    profiles = _fit(profile, network)
    read = "" if asked is None else hold_to(read_layers(network.definition), asked, builder.version)
    ahead_of_time = target.compute_capabilities if target.kind == "tensorrt-rtx" else ()
    engine = network.build(profiles, ahead_of_time, progress, options)
    info = EngineInfo(_runs_on(target, options), profiles, builder.version, options.words())
    error, checked = None, "built, not run"
    if gpu.compute_capability in target.compute_capabilities:
        error, checked = _run(engine, info, onnx, network, gpu)
    said = [str(target), *map(str, profiles), str(options)]
    layers = f"{network.layers} layers of {', '.join(network.precisions)}" + (read and f", {read}")
    detail = (
        f"{said[0]}; {info.built_with}, {', '.join(filter(None, said[1:]))}, {layers}, {len(engine):,} bytes"
    )
    step = Step(name="engine", detail=detail, error=error, checked=checked, refused=refusals(hazards))
    return engine, info, step


def check_target(target: Target, options: BuildOptions | None = None) -> tuple[Target, Gpu]:
    """The target with the compute capabilities that the engine will run on, and the GPU that is here.

    Raises:
        BuildError: nothing can be built for it here, or the package does not have an option.
        MissingExtraError: the package is not installed.
    """
    package(target.kind)
    gpu = find_gpu()
    target = _resolve(target, gpu)
    refuse_lacking(options or BuildOptions(), target, gpu.compute_capability, gpu.why)
    return target, gpu


def known_hazards(onnx: Path) -> tuple[ManifestHazard, ...]:
    """What an engine of the graph could meet with any version of either package, for a bundle's manifest."""
    return tuple(
        ManifestHazard(
            name=item.hazard.name,
            package=TITLES[item.hazard.kind],
            versions=item.hazard.versions,
            what=item.hazard.what,
            reference=item.hazard.reference,
            nodes=item.nodes,
            answer=f"{item.hazard.answer}; {item.hazard.mend}",
        )
        for item in could_meet(read_graph(onnx))
    )


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


def _runs_on(target: Target, options: BuildOptions) -> Target:
    """The target with every GPU that takes the engine."""
    if options.hardware == "same":
        return target
    if not set(target.compute_capabilities) <= set(AMPERE_PLUS):
        raise BuildError(
            f"hardware {options.hardware!r} needs a GPU from Ampere on to build on, not {target}"
        )
    return Target(target.kind, AMPERE_PLUS)


def _fit(profile: Profile | Sequence[Profile] | None, network: Network) -> tuple[Profile, ...]:
    """The profiles, if the network's batch allows them."""
    batch = network.input_shape[0]
    asked = (profile,) if isinstance(profile, Profile) else tuple(profile or ())
    if batch == -1:
        if len(set(asked)) < len(asked):
            raise BuildError(f"the profile {asked[0]} is asked for twice: leave one out")
        return asked or (Profile(),)
    fixed = Profile(batch, batch, batch)
    if set(asked) - {fixed}:
        raise BuildError(
            f"the graph has a fixed batch of {batch}, the profile asks for {', '.join(map(str, asked))}; "
            "export it with dynamic_batch=True, or leave the profile out"
        )
    return (fixed,)


def _run(engine: bytes, info: EngineInfo, onnx: Path, network: Network, gpu: Gpu) -> tuple[float | None, str]:
    """Relative difference between the engine and ONNX Runtime on random images, and how it was measured."""
    profile = info.profiles[0]
    shape = (profile.best, *network.input_shape[1:])
    images = random_images(network.takes_bytes, shape)
    weights = onnx.read_bytes() if info.options.get("weights") == "stripped" else None
    run = EngineBackend(info.target.kind, engine, info.profiles, weights=weights)
    found = run(images)
    types = ", ".join(f"{count} {kind}" for kind, count in run.layer_types().items())
    there = f"run on sm{gpu.compute_capability}" + (types and f", its layers give {types},")
    try:
        expected = OnnxBackend(onnx)(images)
    except MissingExtraError:  # a board may have TensorRT and nothing else
        return None, f"{there} compared with nothing: ONNX Runtime is not installed"
    return relative_error([found], [expected]), f"{there} against ONNX Runtime, batch {profile.best}"
