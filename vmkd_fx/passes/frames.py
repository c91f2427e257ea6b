"""Let a graph take frames, bytes in the camera's layout, where it took normalised images.

    (x / 255 - mean) / std = (x - 255 mean) * 1 / (255 std)

A cast, a permutation where the channels come last, and a channel affine, which `channel_affine` then melts
into the stem: all of it where the stem has no zero padding, and where it has, all but the subtraction. The
cast stands first, for engines do nothing else with bytes. Exact; it rounds to 1e-16 in float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from vmkd_fx.errors import ModelError
from vmkd_fx.frames import Frames
from vmkd_fx.graph.in_double import name_double_
from vmkd_fx.graph.info import ModelInfo
from vmkd_fx.graph.sizes import forget
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.graph.verify import logits_of, probe_images
from vmkd_fx.passes.evaluation import tidied
from vmkd_fx.passes.proof import PROVED, Proof
from vmkd_fx.passes.rewrite import Rewrite
from vmkd_fx.steps import Site, Step
from vmkd_fx.target import Target

aten = torch.ops.aten

NAME = "frames"


def normalised(images: torch.Tensor, frames: Frames) -> torch.Tensor:
    """What the model was trained on, (B, C, H, W) in float64, of frames with mean and std."""
    mean, std = (_column(values, images) for values in (frames.mean, frames.std))
    planes = images.permute(0, 3, 1, 2) if frames.layout == "nhwc" else images
    return (planes.double() / 255 - mean) / std


def frames_for(info: ModelInfo, frames: Frames) -> Frames | None:
    """The frames with the model's own mean and std where they name none; None where it takes them already.

    Raises:
        ModelError: the model takes other frames already, or has another number of channels.
    """
    held = info.frames
    known = info if held is None else held
    full = replace(frames, mean=frames.mean or known.mean, std=frames.std or known.std)
    if held is not None:
        if full == held:
            return None
        raise ModelError(
            f"{info.name} takes frames {_words(held)} already, and {_words(full)} were asked for: "
            "lower the model itself"
        )
    channels = info.need_input_size()[0]
    for name, values in (("mean", full.mean), ("std", full.std)):
        if values is None or len(values) != channels:
            raise ModelError(f"frames: {info.name} has {channels} channels, and {name} is {values}")
    return full


@torch.no_grad()
def feed(proof: Proof, frames: Frames, target: Target) -> Step:
    """Let both graphs of a proof take frames; the ledger's row.

    The twin gets a mean and a std of its own: equal ones for all channels would hide a fold along a wrong
    axis.

    Args:
        proof: of a graph that takes normalised images.
        frames: with mean and std, as `frames_for` gives them.

    Raises:
        VerificationError: the graph on frames computes something else than the one on normalised images.
    """
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.rand(2, len(frames.mean or ()), generator=generator, dtype=torch.float64)
    random = replace(frames, mean=tuple((0.3 + 0.4 * mean).tolist()), std=tuple((0.2 + 0.2 * std).tolist()))
    before = proof.twin
    proof.work, site = _on_frames(proof.work, frames, target)
    proof.twin, _ = _on_frames(proof.twin, random, target)
    proof.images = probe_images(proof.twin)
    proof.logits = logits_of(proof.twin, proof.images)
    expected = logits_of(before, normalised(proof.images, random))
    error, bound = proof.hold(expected, proof.logits, f"feeding {proof.work.info.name} {frames}")
    return Step(NAME, _words(frames), 1, (site,), error=error, tolerance=bound, checked=PROVED)


def _on_frames(module: TracedModule, frames: Frames, target: Target) -> tuple[TracedModule, Site]:
    """A graph on the same tensors that normalises frames itself, and what was written where."""
    copy = fork(module, to_edit=True, throwaway=True)
    copy.meta["info"] = replace(copy.info, frames=frames)
    (images,) = copy.graph.find_nodes(op="placeholder")
    forget(images)
    readers = list(images.users)
    rewrite = Rewrite(copy, target)
    rewrite.take(images, "cast, mean and std" + (", permutation" if frames.layout == "nhwc" else ""))
    rewrite.at(images.next)
    planes = _planes(rewrite, images, frames)
    mean, std = (_column(values, reference_tensor(module)) for values in (frames.mean, frames.std))
    centred = rewrite.call(aten.sub.Tensor, planes, rewrite.put(255 * mean, like=f"{NAME}.mean"))
    scaled = rewrite.call(aten.mul.Tensor, centred, rewrite.put(1 / (255 * std), like=f"{NAME}.scale"))
    for reader in readers:
        reader.replace_input_with(images, scaled)
    name_double_(copy)
    return tidied(copy), rewrite.sites[0]


def _planes(rewrite: Rewrite, images: Node, frames: Frames) -> Node:
    """The numbers 0..255 as (B, C, H, W), in the graph's own dtype."""
    value = rewrite.call(aten._to_copy.default, images, dtype=torch.float64)
    return rewrite.call(aten.permute.default, value, [0, 3, 1, 2]) if frames.layout == "nhwc" else value


def _column(values: tuple[float, ...] | None, like: torch.Tensor) -> torch.Tensor:
    """One value a channel as (C, 1, 1)."""
    assert values is not None
    return torch.tensor(values, dtype=torch.float64, device=like.device).reshape(-1, 1, 1)


def _words(frames: Frames) -> str:
    return f"{frames} with mean {_row(frames.mean)} and std {_row(frames.std)}"


def _row(values: tuple[float, ...] | None) -> str:
    return "?" if values is None else ", ".join(f"{value:.4g}" for value in values)
