"""From a lowered graph to a folder that an edge box can run.

`vmkd_fx.deploy` is this package and the public verb `vx.deploy(...)` at once: the package is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _DeployVerb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from vmkd_fx.deploy.pipeline import deploy

        return deploy(*args, **kwargs)


sys.modules[__name__].__class__ = _DeployVerb
