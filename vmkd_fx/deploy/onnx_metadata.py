"""What an ONNX file says about itself, for whoever has the file and not the bundle.

    vmkd.model        the name
    vmkd.preprocess   from an image to the input, in timm's terms (JSON)
    vmkd.labels       of the classes, in order (JSON)
    vmkd.frames       what the graph takes instead of normalised images (JSON), where it does
    vmkd.versions     of the packages that made it (JSON)

They stand in `metadata_props`; in ONNX Runtime `session.get_modelmeta().custom_metadata_map`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.deploy.versions import versions
from vmkd_fx.frames import Frames


def onnx_metadata(
    name: str, preprocess: Preprocess, labels: Sequence[str], frames: Frames | None
) -> dict[str, str]:
    """The properties; equal arguments and versions give equal text."""
    properties = {
        "model": name,
        "preprocess": _json(asdict(preprocess)),
        "labels": _json(list(labels)),
        "versions": _json(versions()),
    }
    if frames is not None:
        properties["frames"] = _json(asdict(frames))
    return {f"vmkd.{key}": text for key, text in properties.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
