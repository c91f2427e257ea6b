"""What a verification found, a row a hop, and the bounds that a hop is held to."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field

from vmkd_fx.deploy.bundle import Bundle
from vmkd_fx.errors import VerificationError
from vmkd_fx.steps import WIDTH
from vmkd_fx.table import table


@dataclass(frozen=True)
class Bounds:
    """What hops of a bundle in one precision are held to.

    Attributes:
        graph: relative error of the ONNX file against torch in float32.
        engine: relative error of an engine against the ONNX file.
        agreement: part of given images, 0..1, on which both sides of a hop have the same first class.
    """

    graph: float
    engine: float
    agreement: float


# Float32 differs by rounding alone, an engine of it by the 11 bits that tensor cores multiply with (TF32);
# half has 11 bits, bfloat16 8, that is eight times the error. Eight-bit integers round each value to a
# hundredth of its range, so that there the decisions count.
BOUNDS = {
    "fp32": Bounds(1e-4, 1e-2, 0.999),
    "fp16": Bounds(1e-2, 1e-2, 0.995),
    "mixed": Bounds(1e-2, 1e-2, 0.995),
    "bf16": Bounds(8e-2, 8e-2, 0.98),
    "int8": Bounds(3e-1, 1e-1, 0.97),
    "fp8": Bounds(3e-1, 1e-1, 0.97),
}

_HEADER = ("hop", "images", "error", "bound", "top-1", "at least", "layers", "result")
_RIGHT = _HEADER[1:6]


@dataclass(frozen=True)
class Hop:
    """One hop, run again, or the reason why it was not.

    Attributes:
        before, after: what was compared, as in "torch" and "model.onnx".
        how: it was run, in words; or why it was not.
        ran: whether it was.
        images: how many; 0 where no numbers were compared.
        error: largest absolute difference over the largest absolute logit; None where none was measured.
        bound: that the error was held to.
        agreement: part of the images with the same first class, 0..1; None with one class or none measured.
        least: that the agreement was held to; None for random images, on which a model need not be sure.
        layers: how many layers give which data type.
        fault: what is wrong; empty where nothing is.
    """

    before: str
    after: str
    how: str
    ran: bool = True
    images: int = 0
    error: float | None = None
    bound: float | None = None
    agreement: float | None = None
    least: float | None = None
    layers: dict[str, int] = field(default_factory=dict)
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"

    @property
    def result(self) -> str:
        """ "pass", "FAIL" or "not run"."""
        return "FAIL" if self.fault else "pass" if self.ran else "not run"


@dataclass(frozen=True)
class Verification:
    """All hops of a bundle.

    Attributes:
        bundle: as it was when they ran.
        images: which ones they ran on, in words.
        hops: in the order from the trained model to the device.

    `str(verification)` is a table, and what was run how below it.
    """

    bundle: Bundle
    images: str
    hops: tuple[Hop, ...]

    @property
    def faults(self) -> tuple[Hop, ...]:
        """The hops that do not hold."""
        return tuple(hop for hop in self.hops if hop.fault)

    @property
    def compared(self) -> tuple[Hop, ...]:
        """The hops of which both sides were run."""
        return tuple(hop for hop in self.hops if hop.error is not None)

    def check(self) -> None:
        """Raise a VerificationError if a hop does not hold, or no numbers were compared."""
        path = self.bundle.path
        if self.faults:
            faults = "; ".join(f"{hop}: {hop.fault}" for hop in self.faults)
            raise VerificationError(f"{path} is not what it claims to be, and nothing was signed: {faults}")
        if not self.compared:
            raise VerificationError(
                f"no hop of {path} could be compared, so nothing was signed: give the model that it was made "
                "of (vmkd verify BUNDLE CHECKPOINT), or verify it where the GPU of an engine is"
            )

    def __str__(self) -> str:
        manifest = self.bundle.manifest
        lines = [f"{manifest.name} in {manifest.precision}, {self.images}", ""]
        lines += table(_HEADER, map(_cells, self.hops), right=_RIGHT).splitlines()
        lines.append("")
        for hop in self.hops:
            words = f"{hop}: {'' if hop.ran else 'not run: '}{hop.how}"
            lines += textwrap.wrap(words, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join(lines)


def fault_of(images: int, error: float, bound: float, agreement: float | None, least: float | None) -> str:
    """What is wrong with the figures of a hop, or "".

    One image may differ in any case: of a few images it is more than the part that is allowed.
    """
    faults = []
    if not error <= bound:
        faults.append(f"the error is {error:.1e}, and at most {bound:.0e} is allowed")
    if agreement is not None and least is not None:
        different = round((1 - agreement) * images)
        if different > max(1, math.floor((1 - least) * images + 1e-9)):
            faults.append(
                f"{different} of {images} images have another first class, and {_percent(least)} of them "
                "have to have the same one"
            )
    return "; ".join(faults)


def _cells(hop: Hop) -> tuple[object, ...]:
    error, bound = (None if value is None else f"{value:.1e}" for value in (hop.error, hop.bound))
    top, least = (None if value is None else _percent(value) for value in (hop.agreement, hop.least))
    layers = ", ".join(f"{count} {kind}" for kind, count in hop.layers.items())
    return str(hop), hop.images or None, error, bound, top, least, layers, hop.result


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
