"""vmkd-fx: from the graph that trains well to the graph that deploys well.

The public verbs. Importing this package imports neither torch nor timm; each verb brings what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmkd_fx import deploy as deploy
    from vmkd_fx.deploy.bench import bench as bench
    from vmkd_fx.deploy.engine import build as build
    from vmkd_fx.deploy.onnx_export import export as export
    from vmkd_fx.deploy.runtime import load as load
    from vmkd_fx.deploy.verify import verify as verify
    from vmkd_fx.distill.save import save as save
    from vmkd_fx.distill.wrap import wrap as wrap
    from vmkd_fx.graph.anatomy import anatomy as anatomy
    from vmkd_fx.graph.trace import trace as trace
    from vmkd_fx.passes.bisect import bisect as bisect
    from vmkd_fx.passes.compare import bisect_graphs as bisect_graphs
    from vmkd_fx.passes.explain import explain as explain
    from vmkd_fx.passes.feature_taps import tap as tap
    from vmkd_fx.passes.pipeline import ledger as ledger
    from vmkd_fx.passes.pipeline import lower as lower
    from vmkd_fx.passes.pipeline import strip as strip

__version__ = "0.1.0"

_VERBS = {
    "trace": "vmkd_fx.graph.trace",
    "anatomy": "vmkd_fx.graph.anatomy",
    "tap": "vmkd_fx.passes.feature_taps",
    "wrap": "vmkd_fx.distill.wrap",
    "strip": "vmkd_fx.passes.pipeline",
    "save": "vmkd_fx.distill.save",
    "lower": "vmkd_fx.passes.pipeline",
    "ledger": "vmkd_fx.passes.pipeline",
    "explain": "vmkd_fx.passes.explain",
    "bisect": "vmkd_fx.passes.bisect",
    "bisect_graphs": "vmkd_fx.passes.compare",
    "export": "vmkd_fx.deploy.onnx_export",
    "build": "vmkd_fx.deploy.engine",
    "verify": "vmkd_fx.deploy.verify",
    "bench": "vmkd_fx.deploy.bench",
    "load": "vmkd_fx.deploy.runtime",
}

__all__ = ["__version__", "deploy", *_VERBS]


def __getattr__(name: str) -> Any:
    if name == "deploy":  # the sub-package, which is callable: the verb and its home share one name
        return import_module("vmkd_fx.deploy")
    if name not in _VERBS:
        raise AttributeError(f"module 'vmkd_fx' has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)


def __dir__() -> list[str]:
    return __all__
