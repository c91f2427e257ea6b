"""The way to an engine, walked by one small member of a family: lowered, exported, run, parsed, built.

Norm weights, biases and running statistics are random, and so is a head that is fresh and zero, for what is
one or zero everywhere hides what goes wrong with it.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vmkd_fx.deploy.onnx_export import random_images
from vmkd_fx.deploy.precision.agreement import compared, logits_of_file
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.halves import logits
from vmkd_fx.deploy.precision.readback import hold_to, read_layers
from vmkd_fx.deploy.precision.write import write_in
from vmkd_fx.deploy.tensorrt import Network
from vmkd_fx.errors import BuildError, UnknownNameError, VmkdError
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.pipeline import ledger, lower
from vmkd_fx.target import Profile
from vmkd_fx.zoo.fixed_batch import with_batch
from vmkd_fx.zoo.members import MEMBERS, Member, build

TARGET = "tensorrt-rtx"
COMPUTE_CAPABILITIES = (86, 89, 120)
PRECISIONS = ("fp32", "fp16")
PROFILE = Profile(1, 2, 4)
IMAGES = 4
"""Random ones, that ranges and the error of half precision are measured on."""

T = TypeVar("T")


@dataclass
class Engine:
    """One member in one precision; zeros and None where it did not get there.

    Attributes:
        nodes: of the ONNX graph.
        batch: "any", or the one that the graph takes.
        difference, allowed: of ONNX Runtime from torch over the largest logit, and the bound it was held to;
            what is half in the graph is computed wider there.
        from_single: of the graph as it is, in ONNX Runtime, from float32; for half precision.
        layers, fixed_layers: that the parser makes of the graph, and of the same graph for one image.
        built: the compute capabilities that the engine was built for.
        size: of the engine in bytes.
    """

    nodes: int = 0
    batch: str = ""
    difference: float | None = None
    allowed: float | None = None
    from_single: float | None = None
    layers: int = 0
    fixed_layers: int = 0
    built: list[int] = field(default_factory=list)
    size: int = 0


@dataclass
class Deployment:
    """How far a member of a family gets, and what was measured on the way.

    Attributes:
        model, family: timm's name, and the module of timm that it comes from.
        pixels: edge of the images.
        options: of its constructor, that make it smaller than the published one.
        operators: of ATen, before and after lowering; empty where it was not lowered.
        error, bound: the largest error of a step of lowering in float64, and what that step was held to.
        engines: by precision.
        failed: reasons, by what failed.
        seconds: of each stage.
    """

    model: str
    family: str
    pixels: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    operators: list[int] = field(default_factory=list)
    error: float | None = None
    bound: float | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Deployment:
        """The inverse of `to_json`."""
        engines = {precision: Engine(**engine) for precision, engine in data["engines"].items()}
        return cls(**{**data, "engines": engines})


def check_deployment(model: str) -> Deployment:
    """Walk the way of one of `MEMBERS`; whatever goes wrong is a finding in the row, never an exception.

    Raises:
        UnknownNameError: no member is called so.
    """
    member = next((member for member in MEMBERS if member.name == model), None)
    if member is None:
        raise UnknownNameError("member of the zoo", model, [member.name for member in MEMBERS])
    warnings.simplefilter("ignore")  # exporters speak of every model at length
    logging.disable(logging.CRITICAL)
    row = Deployment(member.name, member.family, member.size, dict(member.options))
    module = _tried(row, "lowering", lambda: _lowered(row, member))
    for precision in PRECISIONS if module is not None else ():
        assert module is not None
        _deployed(row, module, precision)
    return row


def _lowered(row: Deployment, member: Member) -> TracedModule:
    model = randomise_(build(member)).eval()
    lowered = lower(trace(model, input_size=(3, member.size, member.size)), TARGET)
    steps = ledger(lowered).steps
    first = next(step for step in steps if step.name == "evaluation")
    row.operators = [first.nodes or 0, steps[-1].nodes or 0]
    worst = max((step for step in steps if step.error is not None), key=lambda step: step.error or 0.0)
    row.error, row.bound = worst.error, worst.tolerance
    return lowered


def _deployed(row: Deployment, module: TracedModule, precision: str) -> None:
    """From the lowered graph to the engine, in one precision."""
    engine = row.engines[precision] = Engine()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        asked = _tried(row, f"{precision}, ONNX", lambda: _exported(engine, module, file, precision))
        if asked is None:
            return
        network = _tried(row, f"{precision}, parser", lambda: Network(TARGET, file))
        if network is None:
            return
        engine.layers = network.layers
        read, version = read_layers(network.definition), network.package.version
        _tried(row, f"{precision}, layer types", lambda: hold_to(read, asked, version))
        one = with_batch(file, 1, Path(folder) / "one.onnx")
        fixed = _tried(row, f"{precision}, parser, batch 1", lambda: Network(TARGET, one))
        engine.fixed_layers = fixed.layers if fixed else 0
        _tried(row, f"{precision}, engine", lambda: _built(engine, network))


def _exported(engine: Engine, module: TracedModule, file: Path, precision: str) -> Asked:
    images = None if precision == "fp32" else random_images(False, (IMAGES, *module.info.need_input_size()))
    ledger, asked = write_in(module, file, precision, images)
    step = ledger.steps[-1]
    engine.nodes = step.nodes or 0
    engine.batch = "any"
    engine.difference, engine.allowed = step.error, step.tolerance
    if images is not None:
        engine.from_single, _ = compared(logits_of_file(file, images), logits(module, images))
    return asked


def _built(engine: Engine, network: Network) -> None:
    """One engine for all; where that fails, one by one, to know which."""
    try:
        engine.size = len(network.build(PROFILE, COMPUTE_CAPABILITIES, progress=False))
        engine.built = list(COMPUTE_CAPABILITIES)
    except BuildError as error:
        for capability in COMPUTE_CAPABILITIES:
            try:
                engine.size = len(network.build(PROFILE, (capability,), progress=False))
                engine.built.append(capability)
            except BuildError:
                continue
        raise error


def _tried(row: Deployment, stage: str, work: Callable[[], T]) -> T | None:
    """What `work` returns, or None and the reason in the row; its seconds too."""
    started = time.perf_counter()
    try:
        return work()
    except Exception as error:  # exporters raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else ""
        row.failed[stage] = reason if isinstance(error, VmkdError) else f"{type(error).__name__}: {reason}"
        return None
    finally:
        row.seconds[stage] = round(time.perf_counter() - started, 1)
