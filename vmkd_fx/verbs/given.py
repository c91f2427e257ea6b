"""The model that a command line names."""

from __future__ import annotations

import argparse
from typing import Any

from vmkd_fx import arguments
from vmkd_fx.errors import RecipeError


def named_or_restored(parsed: argparse.Namespace) -> Any:
    """The model of that name, or the student of that weights file."""
    from vmkd_fx.distill.card import card_for, restore
    from vmkd_fx.graph.trace import trace
    from vmkd_fx.models.named import named_model

    options = arguments.options(parsed.option)
    if is_checkpoint(parsed):
        given = card_for(parsed.model, options) if parsed.model else None
        if options and given is None:
            raise RecipeError(
                f"--option {parsed.option[0]} goes with --model NAME: {parsed.source} has its own"
            )
        model, _ = restore(parsed.source, given)
        return trace(model, input_size=parsed.input_size)
    return trace(named_model(parsed.source, options), input_size=parsed.input_size)


def is_checkpoint(parsed: argparse.Namespace) -> bool:
    return bool(parsed.model) or arguments.names_a_file(parsed.source)
