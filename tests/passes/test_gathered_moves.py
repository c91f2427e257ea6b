"""Movements through padding and repetition as gathers: the same numbers, and no shape arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers.bottleneck_attn import PosEmbedRel
from torch import Tensor, nn
from torch.nn import functional

from tests.deploy.conftest import needs_builder
from tests.passes.lowering import lowered_by, operators
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.passes.cleanup.views import VIEWS
from vmkd_fx.passes.engine.gathered_moves import GATHERED_MOVES, gather_of
from vmkd_fx.passes.engine.gathered_pieces import GATHERED_PIECES
from vmkd_fx.zoo.fixed_batch import with_batch

HEADS, WIDTH, PLACES = 2, 4, (4, 4)


class Moved(nn.Module):
    """A map of 8 channels on 4 x 4 places, moved, and a head that tells every number from every other."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HEADS * WIDTH, 8, 8)
        self.head = nn.Linear(numbers, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.move(torch.tanh(self.stem(x)))).flatten(1))


class Relative(Moved):
    """timm's own logits of relative positions, for each head."""

    def __init__(self) -> None:
        super().__init__(HEADS * 16 * 16)
        self.positions = PosEmbedRel(PLACES, WIDTH, 0.5)

    def move(self, x: Tensor) -> Tensor:
        queries = x.reshape(x.shape[0] * HEADS, WIDTH, 16).transpose(1, 2)
        return self.positions(queries).reshape(x.shape[0], -1)


class Reflected(Moved):
    def __init__(self) -> None:
        super().__init__(8 * 36)

    def move(self, x: Tensor) -> Tensor:
        return functional.pad(x, (1, 1, 1, 1), mode="reflect")


class Repeated(Moved):
    """Each head three times, as grouped queries read keys."""

    def __init__(self) -> None:
        super().__init__(3 * 8 * 16)

    def move(self, x: Tensor) -> Tensor:
        heads = x.reshape(-1, HEADS, 1, WIDTH, *PLACES).expand(-1, -1, 3, -1, -1, -1)
        return heads.reshape(-1, 3 * HEADS * WIDTH, *PLACES)


class Windowed(Moved):
    """A map padded to whole windows of 3 x 3, as in TinyViT and Swin."""

    number = 0.0

    def __init__(self) -> None:
        super().__init__(4 * 9 * 8)

    def move(self, x: Tensor) -> Tensor:
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2), value=self.number)
        return padded.reshape(-1, 2, 3, 2, 3, 8).transpose(2, 3).reshape(-1, 9, 8).reshape(-1, 4 * 9, 8)


class PaddedWithTwo(Windowed):
    number = 2.0


class PaddedWithHalf(Windowed):
    number = 0.5


class Padded(Moved):
    def __init__(self) -> None:
        super().__init__(8 * 36)

    def move(self, x: Tensor) -> Tensor:
        return functional.pad(x, (1, 1, 1, 1))


class OfOthers(Moved):
    """Those of the first image for every image."""

    def __init__(self) -> None:
        super().__init__(8 * 16)

    def move(self, x: Tensor) -> Tensor:
        return x[:1].expand(x.shape[0], -1, -1, -1)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(("make", "gathers"), [(Relative, 2), (Reflected, 1), (Repeated, 1), (Windowed, 1)])
def test_each_chain_is_one_gather(make: type[Moved], gathers: int, target: str) -> None:
    error, module, record = lowered_by(make(), VIEWS, GATHERED_MOVES, target=target)
    assert error < 1e-14  # the layout in memory, and so the order of sums, is another
    assert len(record.sites) == gathers
    found = operators(module)
    assert found["index_select"] == gathers
    assert not {"pad", "expand", "slice"} & set(found)
    assert not lowered_by(make(), VIEWS, GATHERED_MOVES, GATHERED_MOVES, target=target)[2].sites


@pytest.mark.parametrize(
    ("make", "move"), [(Padded, "pad"), (PaddedWithTwo, "pad"), (PaddedWithHalf, "pad"), (OfOthers, "expand")]
)
def test_what_is_read_from_elsewhere_stays(make: type[Moved], move: str) -> None:
    error, module, record = lowered_by(make(), VIEWS, GATHERED_MOVES, target="tensorrt-rtx")
    assert error == 0
    assert operators(module)[move] == 1 and not record.sites
    reasons = [refusal.reason for refusal in record.refusals.values()]
    assert reasons == ["it reads another image, or pads numbers that are no rows"]


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_other_targets_keep_their_movements(target: str) -> None:
    _, module, record = lowered_by(Relative(), VIEWS, GATHERED_MOVES, target=target)
    assert not record.sites and operators(module)["pad"] == 4


def test_heads_share_their_places_and_rows_lie_together() -> None:
    _, module, _ = lowered_by(Relative(), VIEWS, GATHERED_MOVES, target="tensorrt-rtx")
    # (B heads 4, 4, 7) to (B heads, 16, 16), a number at a time; along the width each row of queries alike.
    assert sorted(len(value) for value in module.buffers()) == [64, 256]
    _, module, _ = lowered_by(Repeated(), VIEWS, GATHERED_MOVES, target="tensorrt-rtx")
    assert [value.tolist() for value in module.buffers()] == [[0, 0, 0]]


def test_zeros_stay_zeros_beside_what_is_not_finite() -> None:
    _, module, _ = lowered_by(Windowed(), VIEWS, GATHERED_MOVES, target="tensorrt-rtx")
    assert operators(module)["masked_fill"] == 1
    fill = next(node for node in module.graph.nodes if node.target is torch.ops.aten.masked_fill.Scalar)
    empty = module.get_buffer(fill.args[1].target)
    filled = fill.target(torch.full((2, 4 * 9, 8), torch.inf), empty, *fill.args[2:])
    assert filled.isfinite().sum() == 2 * 8 * (4 * 9 - 16)


@pytest.mark.parametrize(
    ("places", "count", "rows", "length"),
    [
        ([0, 1, 2, 3], 8, [0], 4),
        ([2, 3, 0, 1, 6, 7, 4, 5], 8, [1, 0], 2),
        ([1, 2], 4, [1, 2], 1),
        ([0, 0, 1, 1, 2, 2], 3, [0, 0], 1),
        ([3, 0], 4, [3, 0], 1),
        ([2, 3, -1, -1, 0, 1], 4, [1, -1, 0], 2),
        ([0, -1, 2, -1], 4, [0, -1], 1),
        ([-1, 0, -1, 1], 2, [-1, 0], 1),
        ([-1, -1, 1, 2], 4, [-1, -1, 1, 2], 1),
    ],
)
def test_the_fewest_rows(places: list[int], count: int, rows: list[int], length: int) -> None:
    gather = gather_of(torch.tensor(places), count)
    assert (gather.rows.tolist(), gather.length) == (rows, length)
    values = torch.randn(3, count)
    found = values.reshape(-1, gather.count, length)[:, gather.rows].reshape(3, -1)
    expected = values[:, places].masked_fill(torch.tensor(places) < 0, 0)
    empty = gather.empty.repeat_interleave(length).repeat(expected.shape[1] // (len(gather.rows) * length))
    assert torch.equal(found.masked_fill(empty, 0), expected)


@needs_builder
@pytest.mark.engine
@pytest.mark.parametrize("make", [Relative, Windowed])
def test_a_dynamic_batch_costs_tensorrt_nothing(make: type[Moved], tmp_path: Path) -> None:
    """Each padding left would be eight layers more than for a fixed batch."""
    _, module, _ = lowered_by(make(), VIEWS, GATHERED_MOVES, GATHERED_PIECES, target="tensorrt-rtx")
    export(module.float(), tmp_path / "m.onnx", input_size=(3, 32, 32))
    one = with_batch(tmp_path / "m.onnx", 1, tmp_path / "one.onnx")
    assert Network("tensorrt-rtx", tmp_path / "m.onnx").layers == Network("tensorrt-rtx", one).layers
