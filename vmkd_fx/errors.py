"""One family of errors: every refusal says what was asked, what was found and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VmkdError(Exception):
    """Root of everything that vmkd-fx refuses on purpose."""


class UnknownNameError(VmkdError):
    """A name that is not in a list of known names."""

    def __init__(self, kind: str, asked: str, known: Iterable[str], where: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
        message = f"{where}: " if where else ""
        message += f"there is no {kind} {asked!r}"
        if near:
            message += f"; did you mean {' or '.join(map(repr, near))}?"
        else:
            message += "."
        message += f" Known: {', '.join(known) or 'none'}" if len(known) <= 40 else f" {len(known)} are known"
        super().__init__(message)


class MissingExtraError(VmkdError):
    """An optional package is needed and not installed."""


class ModelError(VmkdError):
    """A model is not what the verb needs: wrong classes, wrong image size, no logits."""


class TraceError(VmkdError):
    """A model cannot be written down as a graph."""


class MatchError(VmkdError):
    """A pass found nothing to work on."""


class ReceiptError(VmkdError):
    """A graph no longer agrees with the receipt of the pass that changed it."""


class VerificationError(VmkdError):
    """A rewritten graph does not compute what it promised to compute."""


class PassError(VmkdError):
    """Lowering passes are in an order that cannot work, or one of them failed."""


class RecipeError(VmkdError):
    """A recipe holds a key or a value that it may not hold."""


class TrainingError(VmkdError):
    """A training cannot go on: its loss or gradient is no longer a finite number, or jumped."""


class TrainingStoppedError(VmkdError):
    """A training was asked to stop; its state is saved and it can go on."""


class CheckpointError(VmkdError):
    """A checkpoint belongs to another model or another recipe, or cannot be read."""


class CacheError(VmkdError):
    """A cache of teacher outputs is of another teacher or other images, incomplete or damaged."""


class DataError(VmkdError):
    """Images or labels are missing, unreadable or of another kind than asked for."""


class ExportError(VmkdError):
    """A model does not become a correct ONNX file."""


class BuildError(VmkdError):
    """An engine cannot be built, or is not what was asked for."""


class BundleError(VmkdError):
    """A bundle is damaged, incomplete or not a bundle."""


class OutputError(VmkdError):
    """A result cannot be written where it was asked to be written."""
