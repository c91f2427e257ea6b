"""From `BuildOptions` to a builder's configuration."""

from __future__ import annotations

from typing import Any

from vmkd_fx.deploy.builder.options import BuildOptions
from vmkd_fx.errors import BuildError

_MEBIBYTE = 2**20


def configure(trt: Any, builder: Any, options: BuildOptions, compute_capabilities: tuple[int, ...]) -> Any:
    """A configuration of `builder`, without optimisation profiles.

    Args:
        trt: the module of the package.
        builder: its builder.
        options: the package has what they ask for (`refuse_lacking`).
        compute_capabilities: of the GPUs to build for; empty for the GPU that is present.

    Raises:
        BuildError: the package does not build for one of them.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then knows the layers' types
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for index, sm in enumerate(compute_capabilities):
            known = getattr(trt.ComputeCapability, f"SM{sm}", None)
            if known is None or not config.set_compute_capability(known, index):
                raise BuildError(f"{trt.__name__} {trt.__version__} does not build for sm{sm}")
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * _MEBIBYTE)
    for flag in _flags(trt, options):
        config.set_flag(flag)
    if options.hardware == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _flags(trt: Any, options: BuildOptions) -> list[Any]:
    flags = []
    if options.refittable:
        flags.append(trt.BuilderFlag.REFIT)
    if options.stripped:
        # The weights that come back are the ones that were there: the builder may use what it knows of them.
        flags += [trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL]
    if options.version_compatible:
        # With the lean runtime inside, an engine would be a file that brings code to run.
        flags += [trt.BuilderFlag.VERSION_COMPATIBLE, trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME]
    return flags
