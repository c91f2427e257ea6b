"""What a training leaves on disk: the state to go on from exactly, and weights.

`resume.pt` holds everything that the next step depends on. Weights are safetensors files; keys under the
reserved prefix "vmkd." are what a pass added for training, the rest is the student's own state dict. Every
file is replaced as a whole, and read as data: nothing in it is executed.
"""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vmkd_fx import __version__
from vmkd_fx.errors import CheckpointError
from vmkd_fx.files import writing
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import unwrapped

_SHOWN = 4


@dataclass(frozen=True)
class ResumeState:
    """A training between two steps.

    Attributes:
        digest: of the recipe.
        settings: plain data that the digest is of, to say what differs when it does.
        step: optimiser steps done.
        epoch, batch: of the next batch; behind the last batch of an epoch its evaluation is next.
        module, ema, optimizer: state dicts; `ema` is None without averaged weights.
        precision: state of the scaling of the loss; empty without.
        guard: what the next loss is held against.
        rng: states of the random number generators, one for each process.
        sums: running sums of the loss terms over the epoch.
        scores: the latest accuracies and the best one.
        seconds: time spent in training and evaluation.
    """

    digest: str
    settings: dict[str, Any]
    step: int
    epoch: int
    batch: int
    module: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    precision: dict[str, Any]
    guard: dict[str, Any]
    rng: list[dict[str, Any]]
    sums: dict[str, float]
    scores: dict[str, Any]
    seconds: float


def save_resume(path: str | os.PathLike[str], state: ResumeState) -> None:
    """Write `state`; whatever goes wrong, the file that was there before stays whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    # torch.save to a path turns a full disk into an unreadable RuntimeError; plain bytes keep the real
    # reason.
    buffer = io.BytesIO()
    torch.save({field.name: getattr(state, field.name) for field in fields(state)}, buffer)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_resume(path: str | os.PathLike[str]) -> ResumeState:
    """Read what `save_resume` wrote.

    Raises:
        CheckpointError: the file is damaged or something else.
    """
    try:
        # torch.load does not compare the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"wrong checksum of {bad}")
        return ResumeState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # zip, pickle, key, type and memory errors have no family of their own
        raise CheckpointError(
            f"{path} is damaged or was written by something else ({_first_line(error)}); "
            f"start over with resume=False (vmkd train --restart)"
        ) from error


def save_weights(path: str | os.PathLike[str], module: nn.Module, **about: Any) -> None:
    """Write the state dict of `module` as safetensors; `about` and the package's version are its metadata.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    save_state(path, unwrapped(module).state_dict(), **about)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Tensor], **about: Any) -> None:
    """Write a state dict as `save_weights` does.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    # A copy each: the format refuses tensors that share memory.
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    # One key: the format stores several in random order, and equal weights shall be equal files.
    metadata = {"vmkd_fx": json.dumps({"version": __version__, **about}, sort_keys=True)}
    data = safetensors.torch.save(tensors, metadata)
    with writing(path) as temporary:
        temporary.write_bytes(data)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_weights` noted in a file; empty for a file by someone else.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("vmkd_fx", "{}"))
    except Exception as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {_first_line(error)}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, drop_prefix: bool = False) -> None:
    """Load weights into `model`, which must have exactly the keys and shapes of the file.

    Args:
        model: what the weights are for; changed in place.
        path: safetensors, or a file of torch.save with a state dict, timm's layouts included (the averaged
            weights, where the file has both).
        drop_prefix: leave out what training added: keys under "vmkd.".

    Raises:
        CheckpointError: the file cannot be read, or belongs to another model.
    """
    load_state(model, read_weights(path, drop_prefix=drop_prefix), str(path))


def read_weights(path: str | os.PathLike[str], *, drop_prefix: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file by key, as `load_weights` reads them.

    Raises:
        CheckpointError: the file cannot be read or holds something else than weights.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise CheckpointError(f"there is no weights file {path}")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:
        reason = "it is neither safetensors nor a torch file of plain tensors"
        raise CheckpointError(
            f"cannot read weights from {path}: {reason} ({type(error).__name__})"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict: a mapping from names to tensors is needed")
    return {key: value for key, value in state.items() if not (drop_prefix and key.startswith(f"{PREFIX}."))}


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state` into `module`, all of it or nothing.

    Raises:
        CheckpointError: counts and names the keys that are missing, unexpected or of another shape.
    """
    module = unwrapped(module)
    own = module.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    differences = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    found = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in differences.items() if keys]
    if found:
        added = any(key.startswith(f"{PREFIX}.") for key in differences["unexpected"])
        hint = f'; keys under "{PREFIX}." are left out by drop_prefix=True' if added else ""
        raise CheckpointError(
            f"{source} belongs to another model. Of {len(own)} keys, {'; '.join(found)}{hint}"
        )
    module.load_state_dict(state)


def rng_state() -> dict[str, Any]:
    """The states of the global generators of torch, Python and NumPy, as plain data and tensors; of GPUs that
    of the current one, for several processes use one each.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
