"""Puts two stand-ins for engines into a bundle in turn, for ever: a kill nearly always falls into a write.

python -m tests.deploy.builder.writer BUNDLE
"""

from __future__ import annotations

import sys

from vmkd_fx.deploy.bundle import read_bundle
from vmkd_fx.deploy.bundle_write import add_engine
from vmkd_fx.deploy.manifest import EngineInfo
from vmkd_fx.steps import Step
from vmkd_fx.target import Profile, Target

INFO = EngineInfo(Target("tensorrt-rtx", (86,)), (Profile(),), "TensorRT-RTX 1.7.1.116")


def contents(letter: str) -> bytes:
    """Large enough that writing it takes a while."""
    return letter.encode() * 2_000_000


def step(letter: str) -> Step:
    """The engine's row in the ledger."""
    return Step("engine", f"{INFO.target}; {letter}", checked="built, not run")


if __name__ == "__main__":
    print("ready", flush=True)
    while True:
        for letter in "ab":
            add_engine(read_bundle(sys.argv[1]), contents(letter), INFO, step(letter))
