"""Every name of the builder's API that vmkd-fx uses, by package and by the version that brought it.

The two packages share an API that changes from release to release: TensorRT 11 took out what decided
precision, TensorRT-RTX has caches and targets of its own. A name that is used and is not in this table, or
that is in it and not in the installed bindings, fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Version = tuple[int, ...]

# The oldest releases whose bindings have been read: JetPack 6 has TensorRT 10.3.
OLDEST: dict[str, Version] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 4)}
BOTH = OLDEST
TENSORRT: dict[str, Version] = {"tensorrt": (10, 3)}
RTX: dict[str, Version] = {"tensorrt-rtx": (1, 4)}


@dataclass(frozen=True)
class Names:
    """Names of one class.

    Attributes:
        owner: the class, or "" for the module itself.
        names: its attributes, methods or members.
        since: by target kind the first version that has them; a kind that is not named does without.
    """

    owner: str
    names: tuple[str, ...]
    since: dict[str, Version]


NAMES = (
    Names(
        "",
        (
            "Builder",
            "BuilderFlag",
            "IBuilderConfig",
            "ILogger",
            "INetworkDefinition",
            "IOptimizationProfile",
            "IProgressMonitor",
            "LayerType",
            "MemoryPoolType",
            "NetworkDefinitionCreationFlag",
            "OnnxParser",
            "OnnxParserRefitter",
            "ParserError",
            "Refitter",
            "uint8",
        ),
        BOTH,
    ),
    Names("", ("ComputeCapability",), RTX),
    Names("", ("HardwareCompatibilityLevel", "ITimingCache"), TENSORRT),
    Names(
        "Builder",
        (
            "create_network",
            "create_builder_config",
            "create_optimization_profile",
            "build_serialized_network",
        ),
        BOTH,
    ),
    Names(
        "IBuilderConfig",
        (
            "add_optimization_profile",
            "builder_optimization_level",
            "profiling_verbosity",
            "progress_monitor",
            "set_flag",
            "set_memory_pool_limit",
        ),
        BOTH,
    ),
    Names("IBuilderConfig", ("num_compute_capabilities", "set_compute_capability"), RTX),
    Names(
        "IBuilderConfig",
        ("create_timing_cache", "get_timing_cache", "hardware_compatibility_level", "set_timing_cache"),
        TENSORRT,
    ),
    Names("ITimingCache", ("serialize",), TENSORRT),
    Names("IRuntimeConfig", ("create_runtime_cache", "set_runtime_cache"), RTX),
    Names("IRuntimeCache", ("deserialize", "serialize"), RTX),
    Names("IOptimizationProfile", ("set_shape",), BOTH),
    Names("INetworkDefinition", ("get_input", "get_layer", "num_layers"), BOTH),
    Names("ILayer", ("get_input", "get_output", "name", "num_inputs", "num_outputs", "type"), BOTH),
    Names("ITensor", ("dtype", "name", "shape"), BOTH),
    Names("ILogger", ("ERROR", "log"), BOTH),
    Names("IProgressMonitor", ("phase_start", "step_complete", "phase_finish"), BOTH),
    Names("OnnxParser", ("get_error", "num_errors", "parse_from_file"), BOTH),
    Names("ParserError", ("desc", "node", "node_name", "node_operator"), BOTH),
    Names("OnnxParserRefitter", ("get_error", "num_errors", "refit_from_bytes"), BOTH),
    Names("Refitter", ("refit_cuda_engine",), BOTH),
    Names("NetworkDefinitionCreationFlag", ("STRONGLY_TYPED",), BOTH),
    Names("LayerType", ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"), BOTH),
    Names("MemoryPoolType", ("WORKSPACE",), BOTH),
    Names("ProfilingVerbosity", ("DETAILED",), BOTH),
    Names("ICudaEngine", ("create_engine_inspector",), BOTH),
    Names("EngineInspector", ("get_engine_information",), BOTH),
    Names("LayerInformationFormat", ("JSON",), BOTH),
    Names("BuilderFlag", ("REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"), BOTH),
    Names("BuilderFlag", ("EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"), TENSORRT),
    Names("HardwareCompatibilityLevel", ("AMPERE_PLUS",), TENSORRT),
    Names("ComputeCapability", ("SM75", "SM80", "SM86", "SM89", "SM120"), RTX),
    Names("ComputeCapability", ("SM121",), {"tensorrt-rtx": (1, 7)}),
)


def version_of(text: str) -> Version:
    """The numbers that a version begins with: "10.14.1.48.post1" is (10, 14, 1, 48)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def missing(module: Any, kind: str) -> tuple[str, ...]:
    """The names of the table that `module`, the bindings of `kind`, should have in its version and lacks."""
    version = version_of(module.__version__)
    absent = []
    for entry in NAMES:
        since = entry.since.get(kind)
        if since is None or version < since:
            continue
        owner = getattr(module, entry.owner, None) if entry.owner else module
        absent += [f"{entry.owner}.{name}".lstrip(".") for name in entry.names if not hasattr(owner, name)]
    return tuple(absent)
