"""How an engine is built, beyond its target and its batch sizes; what a package does not have is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmkd_fx.errors import BuildError
from vmkd_fx.target import Target

HIGHEST_LEVEL = 5

# TensorRT's level "Ampere and newer": every compute capability from 8.0 on that it knows.
AMPERE_PLUS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
HARDWARE = ("same", "ampere+")


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is asked for.

    Attributes:
        level: of optimisation, 0 (fast build) to 5 (long search); None leaves it to the package.
        workspace: scratch memory in MiB that a layer may take; None for all that is free.
        refittable: other weights can be put into the engine later.
        stripped: the engine leaves out the weights and takes them from the bundle's graph when it is loaded.
        version_compatible: a later TensorRT loads the engine, with the lean runtime of the one that built it.
        hardware: "same" for the GPU that it is built on, "ampere+" for every GPU from Ampere on.
        timing_cache: a file where TensorRT keeps what it timed, so that the next build need not.
    """

    level: int | None = None
    workspace: int | None = None
    refittable: bool = False
    stripped: bool = False
    version_compatible: bool = False
    hardware: str = "same"
    timing_cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= HIGHEST_LEVEL:
            raise BuildError(f"optimisation level {self.level}: it goes from 0 to {HIGHEST_LEVEL}")
        if self.workspace is not None and self.workspace < 1:
            raise BuildError(f"a workspace of {self.workspace} MiB: give 1 or more, or leave it out")
        if self.hardware not in HARDWARE:
            raise BuildError(f"hardware {self.hardware!r}: it is one of {', '.join(HARDWARE)}")
        if self.refittable and self.stripped:
            raise BuildError(
                "a refittable engine takes any weights, a stripped one takes back its own: ask for one"
            )

    def words(self) -> dict[str, str]:
        """What was asked for beyond the default, as it stands in a manifest."""
        said = {
            "level": "" if self.level is None else str(self.level),
            "workspace": "" if self.workspace is None else f"{self.workspace} MiB",
            "weights": "stripped" if self.stripped else "refittable" if self.refittable else "",
            "versions": "this and later ones" if self.version_compatible else "",
            "hardware": "" if self.hardware == "same" else self.hardware,
        }
        return {name: value for name, value in said.items() if value}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.words().items())


@dataclass(frozen=True)
class Lacking:
    """An option that a package does not have, or has on a machine with a GPU only.

    Attributes:
        option: a field of `BuildOptions`.
        kind: of the target.
        instead: what to do.
        on_gpu: whether it works where a GPU is.
    """

    option: str
    kind: str
    instead: str
    on_gpu: bool = False


_NEEDS_GPU = "TensorRT-RTX 1.7 asks the GPU for it; build on the machine that the engine runs on"

LACKING = (
    Lacking("refittable", "tensorrt-rtx", _NEEDS_GPU, on_gpu=True),
    Lacking("stripped", "tensorrt-rtx", _NEEDS_GPU, on_gpu=True),
    Lacking(
        "version_compatible",
        "tensorrt-rtx",
        "its engines run with the release that built them; put one engine a release into the bundle",
    ),
    Lacking(
        "hardware",
        "tensorrt-rtx",
        "name the GPUs in the target instead, as in 'tensorrt-rtx:sm86,sm89,sm120'",
    ),
    Lacking(
        "timing_cache",
        "tensorrt-rtx",
        "it times nothing before it runs; it keeps what it compiled on the device in a runtime cache",
    ),
)


def refuse_lacking(options: BuildOptions, target: Target, gpu: int | None, why: str) -> None:
    """Raise a BuildError for an option that the target's package does not have here.

    Args:
        gpu: the compute capability of the GPU that is present, or None.
        why: why there is none.
    """
    default = BuildOptions()
    for lack in LACKING:
        asked = getattr(options, lack.option) != getattr(default, lack.option)
        if not asked or lack.kind != target.kind or (lack.on_gpu and gpu is not None):
            continue
        name = lack.option.replace("_", " ")
        state = f"does not have it here ({why})" if lack.on_gpu else "does not have it"
        raise BuildError(f"{name}: {lack.kind} {state}: {lack.instead}")
