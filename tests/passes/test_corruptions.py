"""A lowering pass whose result is spoiled is stopped, whatever the pass and whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from timm.layers.bottleneck_attn import PosEmbedRel
from torch import nn

import vmkd_fx as vx
from tests.models import FoldableNet, small
from tests.passes.corruptions import CORRUPTIONS, corrupted, products
from tests.random_specs import Net, step
from tests.slow import rest_slow
from vmkd_fx.errors import VerificationError
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.verify import logits_of, probe_images, relative_error
from vmkd_fx.models.cycle_fc import CycleFC
from vmkd_fx.passes.circulant_mixer import CirculantConfig, inject_circulant_mixers
from vmkd_fx.passes.lowering import LOWERING
from vmkd_fx.passes.proof import Proof
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite
from vmkd_fx.target import Target, parse_target

TARGETS = ("onnxruntime", "torch", "tensorrt-rtx")


@dataclass(frozen=True)
class Stage:
    """A graph on which a pass finds something to do, with all passes before it done."""

    lowering_pass: LoweringPass
    proof: Proof
    target: Target

    def spoiled(self, corruption: str, product: int) -> LoweringPass:
        return corrupted(self.lowering_pass, CORRUPTIONS[corruption], product)

    def count(self) -> int:
        """How many products the pass has here."""
        return len(
            products(
                self.lowering_pass, Rewrite(fork(self.proof.twin, to_edit=True, throwaway=True), self.target)
            )
        )

    def harmless(self, corruption: str, product: int) -> bool:
        """Whether the spoiled graph computes the same on other images: a shift of all keys of an attention
        does, and so does the order of what is averaged.
        """
        graph: TracedModule = fork(self.proof.twin, to_edit=True, throwaway=True)
        self.spoiled(corruption, product).run(Rewrite(graph, self.target))
        graph.recompile()
        images = probe_images(self.proof.twin, batch=3, seed=7)
        return relative_error(logits_of(self.proof.twin, images), logits_of(graph, images)) < 1e-12


class Shaped(nn.Module):
    """A norm of tokens that goes back to the shape that it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm1d(8), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.norm(x.flatten(0, 1)).reshape_as(x)).flatten(1))


class Layouts(nn.Module):
    """Maps in both layouts: shifted channels, turns, an expansion, pieces and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.shift, self.mix, self.head = CycleFC(8, 8, (1, 3)), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.normalize(self.stem(x), dim=1)
        x = self.mix(torch.tanh(self.shift(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        one, two = self.conv(x).unflatten(1, (2, 4)).unbind(1)
        x = self.conv(torch.cat([one, torch.sigmoid(two)], 1))
        return self.head(torch.tanh(x).permute(0, 2, 3, 1).mean((1, 2)))


class Neighbours(nn.Module):
    """Overlapping windows, cut out and added up again, and bounds that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(128, 10)
        self.register_buffer("low", torch.tensor(-0.6))
        self.register_buffer("high", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = torch.nn.functional.unfold(self.stem(x), 3, padding=1, stride=2)
        x = torch.nn.functional.fold(torch.tanh(windows), (4, 4), 3, padding=1, stride=2)
        return self.head(x.clamp(self.low, self.high).flatten(1))


class Relative(nn.Module):
    """A linear attention with its normaliser in a column, and weights by relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(8, 10)
        self.positions = PosEmbedRel((4, 4), 8, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.stem(x).flatten(2).transpose(1, 2).chunk(3, -1)
        values = torch.nn.functional.pad(v, (0, 1), value=1.0)
        both = torch.sigmoid(q) @ (torch.sigmoid(k).transpose(1, 2) @ values)
        x = both[..., :-1] / both[..., -1:] + torch.tanh(self.positions(q)) @ v
        return self.head(torch.tanh(x).mean(1))


def models() -> Iterator[nn.Module]:
    """Models small enough to be lowered in a second; each pass finds a site in one."""
    yield Shaped()
    yield Layouts()
    yield Neighbours()
    yield Relative()
    yield inject_circulant_mixers(vx.trace(small("mixer")), CirculantConfig(groups=4)).eval()
    yield FoldableNet()
    yield small("deit")
    yield small("resmlp")
    stem = step("conv", out=8, kernel=2, stride=2, padding="valid")
    branches = step("parallel", names=("3x3 norm", "1x1 norm", "norm", "1x1 3x3"))
    mixed = (step("linear", out=12), step("linear", out=8), step("layer norm"), step("token linear"))
    rolled = (step("moved", how="roll places"), step("act", of="gelu"), step("linear", out=4))
    for steps in ((step("act"), branches, step("act")), (step("conv", weight="scaled"), *mixed, *rolled)):
        yield Net((32, 32), (stem, *steps), "flatten").build()


@cache
def stages() -> dict[str, list[Stage]]:
    """By the name of the pass, the models and targets that give it something to do, one target a model."""
    found: dict[str, list[Stage]] = {lowering_pass.name: [] for lowering_pass in LOWERING}
    for model in models():
        source = vx.trace(model.eval(), copy=True, input_size=(3, 32, 32)).double()
        begun, _ = Proof.of(source)
        met: set[str] = set()
        for text in TARGETS:
            proof, target = replace(begun), parse_target(text)
            for lowering_pass in LOWERING:
                before = replace(proof)
                _, changed = proof.run(lowering_pass, target)
                if changed and lowering_pass.name not in met:
                    met.add(lowering_pass.name)
                    found[lowering_pass.name].append(Stage(lowering_pass, before, target))
    return found


@pytest.mark.parametrize("name", [lowering_pass.name for lowering_pass in LOWERING])
@pytest.mark.parametrize("corruption", rest_slow(sorted(CORRUPTIONS, key="one percent".__ne__)))
def test_a_spoiled_result_is_stopped(name: str, corruption: str) -> None:
    """On the first model where it matters; what is not stopped must compute the same on other images."""
    assert stages()[name], f"no model of `models` gives the pass {name!r} anything to do: add one that does"
    caught = 0
    for stage in stages()[name]:
        count = stage.count()
        for product in sorted({0, count // 2, count - 1} - {count, -1}):
            try:
                replace(stage.proof).run(stage.spoiled(corruption, product), stage.target)
            except VerificationError as error:
                assert str(error).startswith(f"pass {name} on ")
                caught += 1
            else:
                assert stage.harmless(corruption, product), f"product {product} of {name} may be wrong unseen"
        if caught:
            return
    raise AssertionError(f"no {corruption} of the pass {name!r} that matters was tried")


@pytest.mark.parametrize("name", [lowering_pass.name for lowering_pass in LOWERING])
def test_the_same_result_unspoiled_passes(name: str) -> None:
    """The negative control of the negative control."""
    stage = stages()[name][0]
    step_taken, changed = replace(stage.proof).run(replace(stage.lowering_pass), stage.target)
    assert changed
    assert step_taken.error is not None
    assert step_taken.error <= step_taken.tolerance
