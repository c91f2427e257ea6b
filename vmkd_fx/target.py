"""What a model is deployed to: the runtime, the GPUs it is built for, and the batch sizes it must serve."""

from __future__ import annotations

from dataclasses import dataclass

from vmkd_fx.errors import BuildError, UnknownNameError

KINDS = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
ENGINE_KINDS = ("tensorrt", "tensorrt-rtx")

# The compute capabilities that TensorRT-RTX 1.7 can build for without having the GPU at hand.
COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)


@dataclass(frozen=True)
class Target:
    """A runtime and, for TensorRT-RTX, the GPUs an engine is built for.

    Attributes:
        kind: one of `KINDS`.
        compute_capabilities: CUDA compute capabilities times ten (86 is 8.6, an RTX 30), ascending; empty
            where the kind takes none or where the choice is left to the build.

    `str(target)` is the text that `parse_target` reads.
    """

    kind: str
    compute_capabilities: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.compute_capabilities:
            return self.kind
        return f"{self.kind}:{','.join(f'sm{sm}' for sm in self.compute_capabilities)}"


def parse_target(text: str) -> Target:
    """Read a target such as "onnxruntime", "tensorrt-rtx" or "tensorrt-rtx:sm86,sm89,sm120".

    Raises:
        UnknownNameError: the kind or a compute capability is not known.
        BuildError: the kind takes no list of compute capabilities.
    """
    kind, colon, names = text.strip().lower().partition(":")
    if kind not in KINDS:
        raise UnknownNameError("target", kind, KINDS)
    if not colon:
        return Target(kind)
    if kind != "tensorrt-rtx":
        raise BuildError(
            f"target {text!r}: {kind} takes no list of compute capabilities; write {kind!r}, "
            "or 'tensorrt-rtx:sm89' to build for GPUs that are not at hand"
        )
    known = {f"sm{sm}": sm for sm in COMPUTE_CAPABILITIES}
    chosen = set()
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            raise UnknownNameError("compute capability", name, known, where=f"target {text!r}")
        chosen.add(known[name])
    return Target(kind, tuple(sorted(chosen)))


@dataclass(frozen=True)
class Profile:
    """The batch sizes an engine accepts (`smallest` to `largest`) and the one it is fastest at (`best`)."""

    smallest: int = 1
    best: int = 8
    largest: int = 32

    def __post_init__(self) -> None:
        sizes = (self.smallest, self.best, self.largest)
        if not all(type(size) is int and size >= 1 for size in sizes) or list(sizes) != sorted(sizes):
            raise BuildError(
                f"optimisation profile {sizes}: batch sizes must be whole numbers with "
                "1 <= smallest <= best <= largest, as in Profile(1, 8, 32)"
            )

    def __str__(self) -> str:
        return f"batch {self.smallest}/{self.best}/{self.largest}"
