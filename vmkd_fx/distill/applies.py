"""Which methods fit a model, and where one does not, what it lacks, in the anatomy's words."""

from __future__ import annotations

from vmkd_fx.distill.methods import PRESETS, Method
from vmkd_fx.graph.parts import Anatomy
from vmkd_fx.graph.traced import TracedModule

NO_CLASSIFIER = "{} was made without a classifier (num_classes=0), and teachers teach classes"


def applicability(module: TracedModule, known: Anatomy) -> dict[str, str | None]:
    """For each preset None where it applies, else the requirement that the model does not meet."""
    return {name: missing(module, known, method) for name, method in PRESETS.items()}


def missing(module: TracedModule, known: Anatomy, method: Method) -> str | None:
    """The requirement of `method` that a model does not meet; None where it meets all."""
    return NO_CLASSIFIER.format(known.model) if not known.num_classes else method.missing(module, known)
