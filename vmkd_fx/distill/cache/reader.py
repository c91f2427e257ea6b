"""Rows of a cache by (epoch, sample), read shard by shard as training walks through an epoch."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from vmkd_fx.distill.cache.folder import CacheFolder
from vmkd_fx.distill.cache.form import INDEX, Columns
from vmkd_fx.distill.cache.shards import read_column, read_shard
from vmkd_fx.errors import CacheError

_KEPT = 3


class CacheReader:
    """Looks rows up. Every shard is checked when it is opened; the latest few stay in memory.

    A batch is a stretch of the epoch's order and so lies in one or two shards.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self.folder = folder
        self._shards: OrderedDict[tuple[int, int], Columns] = OrderedDict()
        self._epoch = -1
        self._order: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.empty(0, np.int64),) * 2

    def rows(self, epoch: int, samples: NDArray[np.int64]) -> Columns:
        """The rows of `samples` (B,) in that epoch, by column.

        Raises:
            CacheError: one of them is not in the cache, or a file is missing or damaged.
        """
        places = self._places(epoch, samples)
        shards = places // self.folder.manifest.rows
        found: Columns = {}
        for shard in np.unique(shards).tolist():
            here = shards == shard
            within = places[here] - shard * self.folder.manifest.rows
            for name, column in self._shard(epoch, shard).items():
                part = column[within]
                found.setdefault(name, np.empty((len(samples), *part.shape[1:]), part.dtype))[here] = part
        return found

    def _places(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the epoch's order the samples stand."""
        if epoch != self._epoch:
            self._order, self._epoch = self._read_order(epoch), epoch
        names, places = self._order
        found = np.searchsorted(names, samples).clip(max=len(names) - 1)
        if len(missing := samples[names[found] != samples]):
            raise CacheError(
                f"{self.folder.path} has no row for sample {missing[0]} in epoch {epoch}: it is of other "
                f"images, {self.folder.manifest.count} an epoch"
            )
        return places[found]

    def _read_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of an epoch, ascending, and where in its order each stands."""
        folder = self.folder
        files = [folder.file(epoch, shard) for shard in range(folder.shards)]
        if missing := next((file for file in files if not file.exists()), None):
            raise CacheError(
                f"there is no {missing}: the cache does not hold all of epoch {epoch}, counted from 0; "
                f"vmkd cache with the same recipe and --epochs {epoch}:{epoch + 1} adds it"
            )
        order = np.concatenate([read_column(file, INDEX) for file in files]).astype(np.int64)
        places = np.argsort(order, kind="stable")
        return order[places], places

    def _shard(self, epoch: int, shard: int) -> Columns:
        key = (epoch, shard)
        if key not in self._shards:
            self._shards[key] = read_shard(self.folder.file(*key), self.folder.about(*key))
            while len(self._shards) > _KEPT:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]
