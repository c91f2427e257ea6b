"""Registration with timm, by a call and not by an import."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Make the models of this package known to `timm.create_model`; every verb that takes a name calls it."""
    # timm's decorator registers on import.
    import vmkd_fx.models.cycle_mlp
    import vmkd_fx.models.gfnet
    import vmkd_fx.models.mixer
    import vmkd_fx.models.rednet
    import vmkd_fx.models.riformer  # noqa: F401
