"""`bench`: a bundle beside torch, torch.compile and ONNX Runtime, in turns on one machine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vmkd_fx.deploy.bench_machine import hints
from vmkd_fx.deploy.bench_race import Race, Settings
from vmkd_fx.deploy.bench_report import Bench
from vmkd_fx.deploy.bench_sides import NEED_MODEL, RIVALS
from vmkd_fx.deploy.manifest import ONNX
from vmkd_fx.deploy.versions import versions
from vmkd_fx.errors import DataError, UnknownNameError
from vmkd_fx.progress import progress


def bench(
    path: str | os.PathLike[str],
    *,
    against: Sequence[str] | None = None,
    model: Any = None,
    settings: Settings | None = None,
    device: str = "auto",
    predict: str = "class",
    show: bool = True,
) -> Bench:
    """Measure a bundle beside other ways to run the same model.

    Each turn runs every side once, in random order. Random images are used: what they show changes no time.

    Args:
        path: of the bundle.
        against: some of `RIVALS`; by default all that can run here. torch and compile need `model`.
        model: what the bundle was made of, as for `verify`; it is copied.
        settings: how to measure.
        device: of the bundle, as for `load`; torch runs where the bundle does, and beside an engine of less
            than float32 in half by autocast.
        predict: as the bundle was deployed.
        show: progress.

    Raises:
        DataError: too few runs, or a side that needs the model and there is none.
        UnknownNameError: there is no such side.
        VmkdError: the bundle cannot be run here.
    """
    settings = settings or Settings()
    _check(against, model)
    race = Race(os.fspath(path), device, settings)
    if model is not None:
        race.take_model(model, predict)
    for name in RIVALS if against is None else dict.fromkeys(against):
        race.enter(name)
    with _torch_threads(), progress(settings.runs * len(settings.batches), "turns", show=show) as bar:
        figures = [row for batch in settings.batches for row in race.measured(batch, bar)]
    figures, memory = race.with_memory(figures, show)
    manifest = race.manifest
    taken = {row.side for row in figures}
    return Bench(
        name=manifest.name,
        precision=manifest.precision,
        graph=manifest.files[ONNX].sha256,
        sides={name: setup for name, setup in race.setups.items() if name in taken},
        figures=tuple(figures),
        skipped=race.skipped,
        memory=memory,
        machine=race.machine,
        hints=hints(race.on_gpu, race.clocks, race.torch_threads),
        settings={**asdict(settings), "batches": list(settings.batches), "images": "random"},
        versions=versions(),
    )


def _check(against: Sequence[str] | None, model: Any) -> None:
    for name in against or ():
        if name not in RIVALS:
            raise UnknownNameError("side", name, RIVALS)
        if name in NEED_MODEL and model is None:
            raise DataError(
                f"against {name!r}: that needs the model, and a bundle holds its graph alone: "
                "vmkd bench BUNDLE MODEL_OR_CHECKPOINT, or model=... in Python"
            )


@contextlib.contextmanager
def _torch_threads() -> Iterator[None]:
    """torch's number of threads comes back afterwards, where a side sets it."""
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if torch is not None and threads is not None:
            torch.set_num_threads(threads)
