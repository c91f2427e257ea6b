"""What `vmkd inspect` says about a model."""

from __future__ import annotations

import re

from vmkd_fx.distill.applies import applicability
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.table import table


def report(module: TracedModule) -> str:
    """Anatomy, size, what was left out or stayed closed, and which methods apply."""
    known = anatomy(module)
    size = module.info.need_input_size()
    applies = applicability(module, known)
    lines = [
        str(known),
        "",
        f"{parameter_count(module):,} parameters, {multiply_adds(module, size):,} multiply-adds at "
        f"{' x '.join(map(str, size))}",
    ]
    lines += [f"left out: {path}: {reason}" for path, reason in known.left_out]
    lines += [f"closed: {line}" for line in _closed(module)]
    lines += [f"for this image size only: it decides in {place}" for place in module.fixed_by[:1]]
    lines += ["", table(("method", "applies"), [(name, why or "yes") for name, why in applies.items()])]
    return "\n".join(lines)


def _closed(module: TracedModule) -> list[str]:
    """Modules that stayed closed for one reason and differ in numbers alone share a line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for part in module.closed:
        alike.setdefault((re.sub(r"\d+", "*", part.path), part.reason), []).append(part.path)
    return [
        f"{paths[0]}: {reason}" if len(paths) == 1 else f"{series}, {len(paths)} modules: {reason}"
        for (series, reason), paths in alike.items()
    ]
