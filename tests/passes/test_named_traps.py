"""Every trap by name: networks in which one merge is wrong, and ones in which it is right."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import vmkd_fx as vx
from tests.random_specs import Net, Step, step
from tests.slow import rest_slow
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import logits_of, relative_error
from vmkd_fx.passes.rewrite import is_call

aten = torch.ops.aten

STEM = (step("conv", out=8, kernel=2, stride=2, padding="valid"), step("act"))
CONV = step("conv", out=8, kernel=3)
NORM = step("batch norm")
SCALE = step("constant")
AFFINE = step("affine")
TANH = step("act", of="silu")


def parallel(*names: str, stride: int = 1) -> Step:
    return step("parallel", names=names, stride=stride)


def again(of: Step) -> Step:
    return Step(of.kind, of.options, of.branches, "share")


def tied(of: Step) -> Step:
    return Step(of.kind, of.options, of.branches, "tie")


TRAPS: dict[str, tuple[Step, ...]] = {
    "a conv called twice, a norm behind each call": (CONV, NORM, again(CONV), step("batch norm", eps=1e-3)),
    "a conv called twice, a norm behind one call": (CONV, NORM, TANH, again(CONV), TANH),
    "a norm called at two places": (CONV, NORM, TANH, step("conv", out=8, kernel=1), again(NORM)),
    "two convs of one weight": (CONV, NORM, TANH, tied(CONV), SCALE),
    "a block called on its own result": (step("twice", [CONV, NORM]), TANH),
    "a tapped intermediate": (CONV, step("sum", [NORM, TANH], [CONV])),
    "an affine read by two": (CONV, step("affine", how="read twice"), CONV),
    "statistics of the batch": (CONV, step("batch norm", statistics="batch")),
    "statistics of the batch, kept": (CONV, step("batch norm", statistics="written"), CONV),
    "no statistics": (CONV, step("batch norm", statistics="none"), CONV),
    "a scale of the samples": (CONV, step("constant", of="sample"), CONV),
    "a scale along the height": (CONV, step("constant", of="other axis"), CONV),
    "a shift along the height": (CONV, step("constant", operation="x + c", of="other axis"), CONV),
    "a scale along the width": (CONV, step("constant", of="last axis"), CONV),
    "a scale of every place": (CONV, step("constant", of="whole"), CONV),
    "a shift into zero padding": (step("constant", operation="x + c"), CONV),
    "a shift into padding by reflection": (AFFINE, step("conv", out=8, kernel=3, padding="reflect")),
    "a shift into padding around": (AFFINE, step("conv", out=8, kernel=3, padding="circular")),
    "a shift before a pad": (AFFINE, step("pad"), step("conv", out=8, kernel=3, padding="valid")),
    "a pad of ones": (step("pad", value=1.0), step("conv", out=8, kernel=3, padding="valid")),
    "a pad of ones before a norm": (step("pad", value=1.0), NORM, CONV),
    "a padded pool that counts its padding": (AFFINE, step("pool", padded=True, counted=True), CONV),
    "a padded pool that does not": (AFFINE, step("pool", padded=True, counted=False), CONV),
    "a negative scale into a maximum": (step("constant", negative=True), step("pool", of="maximum"), CONV),
    "one minus": (step("constant", operation="c - x"), CONV),
    "a constant divided": (step("constant", operation="c / x"), CONV),
    "a sum with a factor": (step("constant", operation="torch.sub"), CONV),
    "channels shuffled before a norm": (CONV, step("moved", how="shuffle"), NORM, CONV),
    "channels backwards before an affine": (CONV, step("moved", how="indexed"), AFFINE, CONV),
    "half of the channels": (CONV, step("moved", how="half"), NORM, CONV),
    "halves that go two ways": (CONV, step("split", [NORM], [TANH]), CONV),
    "a norm over two branches": (step("concat", [CONV], [TANH]), NORM, CONV),
    "a weight that is computed": (step("conv", out=8, kernel=3, weight="standardised"), NORM),
    "a weight under weight norm": (step("conv", out=8, kernel=3, weight="weight_norm"), NORM),
    "a weight under spectral norm": (step("conv", out=8, kernel=3, weight="spectral_norm"), NORM),
    "a weight that is data too": (step("conv", out=8, kernel=3, weight="also data"), NORM),
    "a weight of other strides": (step("conv", out=8, kernel=3, weight="strided"), NORM),
    "a buffer that is written": (CONV, step("buffer written"), CONV),
    "a group norm of two groups": (AFFINE, step("group norm", groups=2), AFFINE, CONV),
    "a layer norm over whole images": (AFFINE, step("layer norm"), AFFINE, CONV),
    "a shift into an RMS norm": (AFFINE, step("rms norm"), AFFINE, step("linear")),
    "a shift into a mean of squares": (AFFINE, step("centre"), AFFINE),
    "keys and queries under a norm": (AFFINE, step("attention", normed=True), AFFINE),
    "tokens mixed from the left": (AFFINE, step("token linear", turned=False), AFFINE),
    "a class token behind an affine": (AFFINE, step("class token"), AFFINE, step("linear")),
    "an even kernel": (NORM, step("conv", out=8, kernel=2, padding="same"), NORM),
    "a transposed conv in groups": (AFFINE, step("transposed", out=8, stride=2, groups=2), NORM),
    "a residual written in place": (CONV, step("residual", [NORM, CONV], how="+="), NORM),
    "a residual with a factor": (CONV, step("residual", [NORM], how="torch.add"), NORM),
    "a branch less another": (step("sum", [CONV, NORM], [CONV, NORM], how="-"),),
    "a product of branches": (CONV, step("product", [NORM]), AFFINE, CONV),
    "a 1x1 before a padded 3x3": (step("conv", out=6, kernel=1), CONV),
    "two linears in a row": (step("linear", out=4), step("linear", out=12)),
    "two linears of one weight": (step("linear", out=8), tied(step("linear", out=8)), AFFINE),
}


def lowered_right(net: Net) -> TracedModule:
    model = net.build()
    images = torch.randn(3, 3, *net.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = logits_of(deepcopy(model), images)
    lowered = vx.lower(vx.trace(model, input_size=(3, *net.size)), net.target)
    assert relative_error(expected, logits_of(lowered, images)) < 1e-12
    return lowered


def convolutions(module: TracedModule) -> int:
    operators = (aten.convolution, aten.conv1d, aten.conv2d, aten.conv_transpose2d)
    return sum(is_call(node, *operators) for node in module.graph.nodes)


@pytest.mark.parametrize("values", rest_slow(["random", "negative"]))
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_comes_out_right(trap: str, values: str) -> None:
    lowered_right(Net((16, 16), STEM + TRAPS[trap], "flatten", values=values))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("3x3 norm", "1x1 norm", "norm"), 1),
        (("3x3", "3x3", "3x3"), 1),
        (("3x3 norm", "1x3", "turned"), 2),
        (("1x1", "scaled"), 1),
        (("3x3 norm", "average"), 2),
        (("3x3", "reflect"), 2),
        (("3x3", "relu"), 1),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_sum_of_branches_is_as_many_convolutions(names: tuple[str, ...], left: int, stride: int) -> None:
    """Beside the stem's; a branch that is none stays a branch, and so does one on the transposed image or one
    with a padded average behind it.
    """
    if "relu" in names and stride == 2:
        names = ("3x3", "reflect", "1x1")
        left = 2
    module = lowered_right(Net((16, 16), (*STEM, parallel(*names, stride=stride), TANH), "flatten"))
    assert convolutions(module) == 1 + left
