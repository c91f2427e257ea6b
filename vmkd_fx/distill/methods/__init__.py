"""Distillation methods: what each puts into the student, reads in the teachers and adds to the loss."""

from vmkd_fx.distill.methods.base import Batch, Method, Source, Term
from vmkd_fx.distill.methods.pairs import Wanted
from vmkd_fx.distill.methods.presets import PRESETS, resolve, resolve_all, settings_of

__all__ = ["PRESETS", "Batch", "Method", "Source", "Term", "Wanted", "resolve", "resolve_all", "settings_of"]
