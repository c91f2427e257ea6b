"""Two ways from one torch model to an ONNX file: this project's, and what an engineer has without it.

The engineer's is timm's own re-parameterisation, the exporter of torch with a dynamic batch, and onnxslim.
Both are asked for the same opset; ONNX Runtime's optimiser then reads either file.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import timm.data
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import vmkd_fx as vx
from vmkd_fx.extras import require


def ours(model: nn.Module, target: str, path: Path, opset: int) -> Path:
    """Write `model`, lowered for `target`, to `path`.

    Raises:
        VmkdError: it cannot be lowered or exported.
    """
    vx.export(vx.lower(model, target), path, opset=opset)
    return _inlined(path)


def theirs(model: nn.Module, path: Path, opset: int) -> Path:
    """Write `model` to `path` as one does without this project; whatever its tools raise passes through.

    Raises:
        MissingExtraError: onnxslim is not installed.
    """
    onnxslim = require("onnxslim", "bench", "the chain that lowering is compared with")
    size = timm.data.resolve_model_data_config(model)["input_size"]
    with torch.no_grad():
        torch.onnx.export(
            reparameterize_model(model),
            (torch.randn(2, *size),),
            path,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    slim = onnxslim.slim(str(_inlined(path)))
    onnx.save(slim, path)
    return path


def opset_of(path: Path) -> int:
    """The opset of the ONNX standard that a file is written in."""
    imported = onnx.load(path, load_external_data=False).opset_import
    return next(entry.version for entry in imported if entry.domain in ("", "ai.onnx"))


def _inlined(path: Path) -> Path:
    """`path`, its functions of the model's own put in place of their calls."""
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(path)), path)
    return path
