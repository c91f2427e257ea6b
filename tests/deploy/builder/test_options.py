"""What is asked of a builder is said in the ledger, and what a package does not have is refused first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import needs_builder
from vmkd_fx import arguments
from vmkd_fx.deploy.builder.options import LACKING, BuildOptions, refuse_lacking
from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.engine import build
from vmkd_fx.deploy.gpu import find_gpu
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import BuildError
from vmkd_fx.steps import Step
from vmkd_fx.target import Profile, Target

without_gpu = pytest.mark.skipif(find_gpu().compute_capability is not None, reason="a GPU is here")

ASKED: dict[str, Any] = {
    "refittable": True,
    "stripped": True,
    "version_compatible": True,
    "hardware": "ampere+",
    "timing_cache": "cache",
}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"level": 6}, "from 0 to 5"),
        ({"level": -1}, "from 0 to 5"),
        ({"workspace": 0}, "1 or more"),
        ({"hardware": "hopper"}, r"same, ampere\+"),
        ({"refittable": True, "stripped": True}, "ask for one"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BuildError, match=match):
        BuildOptions(**options)


def test_options_in_words() -> None:
    assert str(BuildOptions()) == "" and BuildOptions().words() == {}
    assert (
        str(BuildOptions(level=2, workspace=64, stripped=True))
        == "level 2, workspace 64 MiB, weights stripped"
    )


@pytest.mark.parametrize("option", sorted(ASKED))
def test_tensorrt_rtx_without_a_gpu_has_none_of_these(option: str) -> None:
    options = BuildOptions(**{option: ASKED[option]})
    with pytest.raises(BuildError, match=f"^{option.replace('_', ' ')}: tensorrt-rtx does not have it"):
        refuse_lacking(options, Target("tensorrt-rtx", (86,)), None, "no GPU found")
    refuse_lacking(options, Target("tensorrt", (87,)), 87, "")


def test_what_needs_a_gpu_is_there_with_one() -> None:
    on_gpu = {lack.option for lack in LACKING if lack.on_gpu}
    assert on_gpu == {"refittable", "stripped"}
    for option in on_gpu:
        refuse_lacking(BuildOptions(**{option: True}), Target("tensorrt-rtx", (89,)), 89, "")


@needs_builder
@pytest.mark.engine
@without_gpu
@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_tensorrt_rtx_really_cannot(option: str, exported: tuple[Path, Step]) -> None:
    """Why the table of what is lacking says so: a package that learns it should lose its row."""
    network = Network("tensorrt-rtx", exported[0])
    with pytest.raises(BuildError, match="it asked the GPU, and there is none"):
        network.build(Profile(), (86,), False, BuildOptions(**{option: True}))


@needs_builder
@pytest.mark.engine
def test_several_profiles_level_and_workspace_reach_the_bundle(bundle_path: Path) -> None:
    profiles = [Profile(1, 1, 1), Profile(8, 16, 32)]
    options = BuildOptions(level=1, workspace=256)
    step = build(
        bundle_path, target="tensorrt-rtx:sm86,sm89", profile=profiles, options=options, progress=False
    )
    assert "batch 1/1/1, batch 8/16/32, level 1, workspace 256 MiB, " in step.detail
    ((_, info),) = read_bundle(bundle_path).engines.items()
    assert info.profiles == tuple(profiles)
    assert info.options == {"level": "1", "workspace": "256 MiB"}


@needs_builder
@pytest.mark.engine
def test_profiles_make_engines_larger(exported: tuple[Path, Step], tmp_path: Path) -> None:
    sizes = []
    for profiles in ([Profile(1, 1, 1)], [Profile(1, 1, 1), Profile(8, 16, 32)]):
        build(exported[0], tmp_path / "m", target="tensorrt-rtx:sm86", profile=profiles, progress=False)
        sizes.append((tmp_path / "m").stat().st_size)
    assert sizes[1] > 1.3 * sizes[0]
    with pytest.raises(BuildError, match="asked for twice"):
        build(exported[0], target="tensorrt-rtx:sm86", profile=[Profile(), Profile()], progress=False)


@needs_builder
@pytest.mark.engine
def test_a_workspace_that_is_too_small(exported: tuple[Path, Step], tmp_path: Path) -> None:
    options = BuildOptions(workspace=1)
    with pytest.raises(BuildError, match="no kernel fits into the workspace"):
        build(exported[0], tmp_path / "m", target="tensorrt-rtx:sm86", options=options, progress=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", Profile(4, 4, 4)), ("1,8,32", Profile(1, 8, 32)), ("1, 2, 3", Profile(1, 2, 3))],
)
def test_a_profile_on_the_command_line(text: str, expected: Profile) -> None:
    assert arguments.profile(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,2", "3,2,1", "0", "1,2,3,4", "-1"])
def test_a_profile_that_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.profile(text)
