"""Registration with timm, by a call and not by an import."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Make the models of this package known to `timm.create_model`; every verb that takes a name calls it."""
    import vmkd_fx.models.mixer  # noqa: F401 (timm's decorator registers on import)
