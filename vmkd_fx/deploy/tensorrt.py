"""One adapter for two packages with one API: `tensorrt_rtx` and `tensorrt`.

Everything that touches their builder is here: reading an ONNX file into a network, asking the network what it
holds, building it. Their complaints are collected and raised as a BuildError that names the ONNX node.
"""

from __future__ import annotations

import functools
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from vmkd_fx.errors import BuildError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile


@dataclass(frozen=True)
class Package:
    """An engine runtime: the module, its name for people, its version, and where its messages gather."""

    module: ModuleType
    title: str
    messages: Any

    @property
    def version(self) -> str:
        """As in "TensorRT-RTX 1.7.1.116"."""
        return f"{self.title} {self.module.__version__}"


@functools.cache
def package(kind: str) -> Package:
    """The package behind the target kind "tensorrt-rtx" or "tensorrt".

    One a process, because the library keeps the first logger it is given and ignores later ones.

    Raises:
        MissingExtraError: it is not installed.
    """
    name, extra, title = {
        "tensorrt-rtx": ("tensorrt_rtx", "rtx", "TensorRT-RTX"),
        "tensorrt": ("tensorrt", "tensorrt", "TensorRT"),
    }[kind]
    module = require(name, extra, f"a {title} engine")
    return Package(module, title, _collector(module))


class Network:
    """An ONNX file as a strongly typed network, ready to be built.

    Attributes:
        input_shape: (B, C, H, W); B is -1 where the batch is dynamic.
        layers: how many the parser made.
        precisions: the data types of all layer outputs, as in ("FLOAT", "HALF").
    """

    def __init__(self, kind: str, onnx: Path) -> None:
        """Parse `onnx`.

        Raises:
            BuildError: the file is not ONNX, or holds an operator that the parser refuses.
            MissingExtraError: the package is not installed.
        """
        self.package = package(kind)
        trt = self.package.module
        self.package.messages.errors.clear()
        self._builder = trt.Builder(self.package.messages)
        self._network = self._builder.create_network(_strongly_typed(trt))
        self._parser = trt.OnnxParser(self._network, self.package.messages)
        if not self._parser.parse_from_file(str(onnx)):
            raise BuildError(f"{self.package.version} cannot read {onnx}: {self._parser_errors()}")
        self.input_shape = tuple(self._network.get_input(0).shape)
        self.layers = self._network.num_layers
        self.precisions = tuple(sorted({tensor.dtype.name for _, tensor in self._outputs()}))

    def products(self, *precisions: str) -> list[str]:
        """The names of the matrix products and convolutions whose result has one of `precisions`."""
        kind = self.package.module.LayerType
        kinds = (kind.MATRIX_MULTIPLY, kind.CONVOLUTION, kind.DECONVOLUTION)
        found = (layer for layer, tensor in self._outputs() if tensor.dtype.name in precisions)
        return [layer.name for layer in found if layer.type in kinds]

    def build(self, profile: Profile, compute_capabilities: tuple[int, ...], progress: bool) -> bytes:
        """The serialised engine.

        Args:
            profile: batch sizes; not used where the batch is fixed.
            compute_capabilities: of the GPUs to build for; empty for the GPU that is present.
            progress: a bar on a terminal, a line elsewhere.

        Raises:
            BuildError: the builder refuses the network.
        """
        trt = self.package.module
        config = self._builder.create_builder_config()
        if compute_capabilities:
            config.num_compute_capabilities = len(compute_capabilities)
            for index, sm in enumerate(compute_capabilities):
                known = getattr(trt.ComputeCapability, f"SM{sm}", None)
                if known is None or not config.set_compute_capability(known, index):
                    raise BuildError(f"{self.package.version} does not build for sm{sm}")
        if self.input_shape[0] == -1:
            config.add_optimization_profile(self._optimisation_profile(profile))
        self.package.messages.errors.clear()
        with _interruptible(), _progress(trt, config, f"building for {self.package.title}", progress):
            engine = self._builder.build_serialized_network(self._network, config)
        if engine is None:
            raise BuildError(f"{self.package.version} cannot build the network: {self._builder_errors()}")
        return bytes(engine)

    def _outputs(self) -> Iterator[tuple[Any, Any]]:
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            yield from ((layer, layer.get_output(i)) for i in range(layer.num_outputs))

    def _optimisation_profile(self, profile: Profile) -> Any:
        optimisation = self._builder.create_optimization_profile()
        batches = (profile.smallest, profile.best, profile.largest)
        name = self._network.get_input(0).name
        optimisation.set_shape(name, *((batch, *self.input_shape[1:]) for batch in batches))
        return optimisation

    def _parser_errors(self) -> str:
        errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
        return "; ".join(
            f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" if e.node_name() else e.desc()
            for e in errors
        )

    def _builder_errors(self) -> str:
        messages = self.package.messages.errors or ["it gives no reason"]
        names = (self._network.get_layer(index).name for index in range(self._network.num_layers))
        node = next((name for name in names if any(f"'{name}'" in message for message in messages)), None)
        return (f"node {node!r}: " if node else "") + "; ".join(messages)


def _strongly_typed(trt: ModuleType) -> int:
    """The creation flag; without it networks of TensorRT 10 are weakly typed."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _collector(trt: Any) -> Any:
    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                # Where in the library's own source it was raised helps nobody here.
                self.errors.append(re.sub(r"\.? In \w+ at /\S+?(?=\)?$)", "", message))

    return Collector()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C during the build is raised after it: the library's callbacks would swallow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _progress(trt: Any, config: Any, title: str, wanted: bool) -> Iterator[None]:
    """Show how far the builder is: a bar on a terminal, one line elsewhere, nothing if not `wanted`."""
    if not wanted:
        yield
    elif sys.stderr.isatty() and find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(desc=title, unit="phase", leave=False) as bar:
            monitor = _monitor(trt, bar)  # must outlive the build
            config.progress_monitor = monitor
            yield
    else:
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield


def _monitor(trt: Any, bar: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Moves the bar with the steps of the outermost phase and names the innermost one beside it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost = phase_name
                bar.reset(total=num_steps)
            bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                bar.update(step + 1 - bar.n)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outermost:
                bar.update(bar.total - bar.n)
            bar.refresh()

    return Monitor()
