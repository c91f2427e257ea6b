from __future__ import annotations

from pathlib import Path

import pytest

from tests.distill.data.pictures import make_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 12 pictures each to train on and 5 to judge on."""
    return make_folders(tmp_path_factory.mktemp("pictures"))
