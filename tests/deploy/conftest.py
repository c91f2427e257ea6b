"""One small mixer, exported once; bundles are copies of one that was written once."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from vmkd_fx.deploy.bundle_write import write_bundle
from vmkd_fx.deploy.onnx_export import export
from vmkd_fx.deploy.preprocess import Preprocess
from vmkd_fx.steps import Ledger, Step

LABELS = tuple(f"digit {i}" for i in range(10))

needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (extra rtx)"
)


def small_mixer() -> nn.Module:
    """A mixer for 32 x 32 images; every parameter is random, since fresh norms and heads hide errors."""
    torch.manual_seed(0)
    model = MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def mixer() -> nn.Module:
    return small_mixer()


@pytest.fixture(scope="session")
def exported(mixer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Step]:
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return path, export(mixer, path)


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=1.0)


@pytest.fixture(scope="session")
def _written(
    exported: tuple[Path, Step], preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    onnx, step = exported
    path = tmp_path_factory.mktemp("bundles") / "written"
    ledger = Ledger((step,), {"class": 0.5})
    return write_bundle(path, onnx=onnx, preprocess=preprocess, labels=LABELS, ledger=ledger, name="mixer")


@pytest.fixture
def bundle_path(_written: Path, tmp_path: Path) -> Path:
    """A bundle without engines that the test may spoil."""
    return Path(shutil.copytree(_written, tmp_path / "bundle"))


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """Seven uint8 images (7, 32, 32, 3)."""
    return np.random.default_rng(1).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
