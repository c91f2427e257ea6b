"""Passes as the command line names them: those of `lower`, and "package.module:PASS" for one's own."""

from __future__ import annotations

from vmkd_fx.errors import PassError
from vmkd_fx.passes.lowering import chosen_passes
from vmkd_fx.passes.rewrite import LoweringPass
from vmkd_fx.user_code import from_user_code


def named_passes(names: str | None, autotune: bool = False) -> tuple[LoweringPass, ...]:
    """The passes of names separated by commas, in that order; all of `LOWERING` for None.

    Raises:
        UnknownNameError: there is no such pass, or the module holds nothing of this name.
        RecipeError: a module cannot be imported.
        PassError: what a module holds is no pass; one is named twice, or before one that it has to follow.
    """
    if names is None:
        return chosen_passes(None, autotune)
    given = filter(None, (name.strip() for name in names.split(",")))
    return chosen_passes([_own(name) if ":" in name else name for name in given], autotune)


def _own(name: str) -> LoweringPass:
    found = from_user_code(name, "pass")
    if not isinstance(found, LoweringPass):
        raise PassError(
            f"{name} is of type {type(found).__name__} and no pass; a pass is a LoweringPass(name, function)"
        )
    return found
