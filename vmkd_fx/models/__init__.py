"""Models that timm lacks, known to `timm.create_model` after `register()`."""

from vmkd_fx.models.registry import register

__all__ = ["register"]
