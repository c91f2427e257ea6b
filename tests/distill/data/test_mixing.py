from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, rand_bbox

from tests.distill.data.pictures import joined, opened, same
from vmkd_fx.distill.data import Digits, Mixing
from vmkd_fx.distill.data.mixing import _box
from vmkd_fx.errors import DataError

CLASSES = 5


def drawn(mixing: Mixing, pairs: int = 2000) -> list[tuple[float, bool]]:
    """The share that is kept, and whether it was cut, of many pairs."""
    found = (mixing.draw(0, 0, pair, (32, 32)) for pair in range(pairs))
    return [(kept, box is not None) for kept, box in found]


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(0.2, 0.0), Mixing(0.0, 1.0), Mixing(0.8, 1.0, 0.5, 0.2)])
def test_the_distributions_are_those_of_timm(mixing: Mixing) -> None:
    ours = drawn(mixing)
    np.random.seed(0)
    theirs = Mixup(mixing.mixup, mixing.cutmix, prob=mixing.prob, switch_prob=mixing.switch_prob)
    kept, cut = theirs._params_per_elem(2000)
    boxed = cut & (kept != 1)
    assert abs(np.mean([box for _, box in ours]) - boxed.mean()) < 0.04
    assert abs(np.mean([share == 1 for share, _ in ours]) - (kept == 1).mean()) < 0.04
    # timm's are float32, in which a share near 1 is 1: compared below that.
    mixed = np.array([share for share, box in ours if not box and share < 0.999999])
    expected = kept[~boxed & (kept < 0.999999)]
    assert (len(mixed) > 0) == (len(expected) > 0) == (mixing.mixup > 0)
    if len(expected):
        # Kolmogorov and Smirnov's statistic of two samples, and its critical value at 1 %.
        edges = np.concatenate((mixed, expected))
        shares = [(np.sort(one)[:, None] <= edges).mean(0) for one in (mixed, expected)]
        assert np.abs(shares[0] - shares[1]).max() < 1.63 * np.sqrt(1 / len(mixed) + 1 / len(expected))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.75, 0.999])
def test_a_box_is_timms_for_the_same_centre(kept: float) -> None:
    np.random.seed(7)
    top, bottom, left, right = rand_bbox((3, 24, 40), kept)
    share, (rows, columns) = _box(kept, (24, 40), np.random.RandomState(7))
    assert (rows.start, rows.stop, columns.start, columns.stop) == (top, bottom, left, right)
    assert share == 1 - (bottom - top) * (right - left) / (24 * 40)


class _Given(Mixup):
    """timm's, with the numbers that were drawn elsewhere."""

    given: tuple[float, bool]

    def _params_per_elem(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.given[0]]), np.array([self.given[1]])


@pytest.mark.parametrize("pair", range(4))
def test_a_pair_becomes_what_timm_makes_of_it(pair: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With label smoothing in the loss where timm has it in the targets."""
    images, targets = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    kept, box = Mixing().draw(0, 0, pair, (16, 16))
    if box is not None:
        edges = (box[0].start, box[0].stop, box[1].start, box[1].stop)
        monkeypatch.setattr("timm.data.mixup.rand_bbox", lambda *_, **__: edges)
    theirs = _Given(label_smoothing=0.1, mode="pair", num_classes=CLASSES)
    theirs.given = (kept, box is not None)
    expected, soft = theirs(images.clone(), targets)
    mixed, shares = Mixing().mix(images.clone(), targets, first=2 * pair, seed=0, epoch=0, classes=CLASSES)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(0.9 * shares + 0.1 / CLASSES, soft)
    assert not torch.equal(mixed, images)


def test_mixed_batches_do_not_depend_on_processes_batch_size_or_start(folders: Path) -> None:
    data = opened(folders, mixing={"switch_prob": 0.5})
    whole = list(data.train_batches(2, batch_size=8, seed=1))
    shares = (data.train_batches(2, batch_size=8, seed=1, rank=rank, world_size=2) for rank in range(2))
    assert same(joined(shares), whole)
    assert same(data.train_batches(2, 2, batch_size=8, seed=1), whole[2:])
    small = data.train_batches(2, batch_size=4, seed=1)
    assert torch.equal(
        torch.cat([batch.images for batch in small])[:32], torch.cat([b.images for b in whole])
    )
    targets = torch.cat([batch.targets for batch in whole])
    assert targets.shape == (32, 3) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(32))
    assert bool(((targets > 0).sum(1) == 2).any())


def test_a_pair_is_mixed_with_each_other_and_no_one_else(folders: Path) -> None:
    data = opened(folders, mixing={"cutmix": 0.0})
    batch = next(data.train_batches(0, batch_size=8))
    singles = [data.sample(index, 0) for index in batch.indices.tolist()]
    mixing = Mixing(cutmix=0.0)
    for place in range(8):
        kept, _ = mixing.draw(0, 0, place // 2, (32, 32))
        (image, target), (other, its_target) = singles[place], singles[place ^ 1]
        torch.testing.assert_close(batch.images[place], image * kept + other * (1 - kept))
        assert float(batch.targets[place, target]) == pytest.approx(
            1 if target == its_target else kept, abs=1e-6
        )


def test_mixing_ends_at_its_epoch() -> None:
    data = Digits(20, mixing=Mixing(off_epoch=2))
    mixed, plain = (next(data.train_batches(epoch, batch_size=10)) for epoch in (1, 2))
    assert mixed.targets.dtype == torch.float32
    assert plain.targets.dtype == torch.int64
    assert torch.equal(plain.images, next(Digits(20).train_batches(2, batch_size=10)).images)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(DataError, match="5 images at position 0 leave one alone"):
        next(Digits(20, mixing=Mixing()).train_batches(0, batch_size=5))
    with pytest.raises(DataError, match="mixup or cutmix above 0"):
        Mixing(0.0, 0.0)
    with pytest.raises(DataError, match=r"in 0\.\.1, found 2"):
        Mixing(prob=2)
