"""One adapter for two packages with one API: `tensorrt_rtx` and `tensorrt`.

Everything that touches their builder is here: reading an ONNX file into a network, asking the network what it
holds, building it. Their complaints are collected and raised as a BuildError that names the ONNX node.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vmkd_fx.deploy.builder.complaints import building, collector, parsing
from vmkd_fx.deploy.builder.configure import configure
from vmkd_fx.deploy.builder.monitor import watched
from vmkd_fx.deploy.builder.names import OLDEST, Version, version_of
from vmkd_fx.deploy.builder.options import BuildOptions
from vmkd_fx.deploy.builder.timing_cache import TimingCache
from vmkd_fx.deploy.onnx_nodes import read_graph
from vmkd_fx.errors import BuildError
from vmkd_fx.extras import require
from vmkd_fx.target import Profile

TITLES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class Package:
    """An engine runtime: the module, its name for people, its version, and where its messages gather."""

    kind: str
    module: ModuleType
    title: str
    messages: Any

    @property
    def version(self) -> str:
        """As in "TensorRT-RTX 1.7.1.116"."""
        return f"{self.title} {self.module.__version__}"

    @property
    def numbers(self) -> Version:
        """The version, to compare."""
        return version_of(self.module.__version__)


@functools.cache
def package(kind: str) -> Package:
    """The package behind the target kind "tensorrt-rtx" or "tensorrt".

    One a process, because the library keeps the first logger it is given and ignores later ones.

    Raises:
        BuildError: it is too old.
        MissingExtraError: it is not installed.
    """
    name, extra = {"tensorrt-rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "tensorrt")}[kind]
    title = TITLES[kind]
    module = require(name, extra, f"a {title} engine")
    if version_of(module.__version__) < OLDEST[kind]:
        oldest = ".".join(map(str, OLDEST[kind]))
        raise BuildError(
            f"{title} {module.__version__} is installed, and vmkd-fx works with {oldest} and later"
        )
    return Package(kind, module, title, collector(module))


class Network:
    """An ONNX file as a strongly typed network, ready to be built.

    Attributes:
        input_shape: (B, C, H, W), or as the graph's frames lie; B is -1 where the batch is dynamic.
        takes_bytes: whether the input is uint8 frames, and not float32 images.
        graph: the nodes of the file.
        layers: how many the parser made.
        precisions: the data types of all layer outputs, as in ("FLOAT", "HALF").
    """

    def __init__(self, kind: str, onnx: Path) -> None:
        """Parse `onnx`.

        Raises:
            BuildError: the file is not ONNX, or holds an operator that the parser refuses; the message names
                the node and the module that it came from.
            MissingExtraError: the package is not installed.
        """
        self.package = package(kind)
        self.graph = read_graph(onnx)
        trt = self.package.module
        self.package.messages.errors.clear()
        self._builder = trt.Builder(self.package.messages)
        self._network = self._builder.create_network(_strongly_typed(trt))
        self._parser = trt.OnnxParser(self._network, self.package.messages)
        if not self._parser.parse_from_file(str(onnx)):
            errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
            raise BuildError(f"{self.package.version} cannot read {onnx}: {parsing(errors, self.graph)}")
        self.input_shape = tuple(self._network.get_input(0).shape)
        self.takes_bytes = self._network.get_input(0).dtype == trt.uint8
        self.layers = self._network.num_layers
        self.precisions = tuple(sorted({tensor.dtype.name for _, tensor in self._outputs()}))

    @property
    def definition(self) -> Any:
        """The package's own network."""
        return self._network

    def products(self, *precisions: str) -> list[str]:
        """The names of the matrix products and convolutions whose result has one of `precisions`."""
        kind = self.package.module.LayerType
        kinds = (kind.MATRIX_MULTIPLY, kind.CONVOLUTION, kind.DECONVOLUTION)
        found = (layer for layer, tensor in self._outputs() if tensor.dtype.name in precisions)
        return [layer.name for layer in found if layer.type in kinds]

    def build(
        self,
        profiles: Profile | Sequence[Profile],
        compute_capabilities: tuple[int, ...],
        progress: bool,
        options: BuildOptions | None = None,
    ) -> bytes:
        """The serialised engine.

        Args:
            profiles: batch sizes, an optimisation profile each; not used where the batch is fixed.
            compute_capabilities: of the GPUs to build for; empty for the GPU that is present.
            progress: a bar on a terminal, lines elsewhere.
            options: what else is asked for.

        Raises:
            BuildError: the builder refuses the network.
            KeyboardInterrupt: Ctrl-C was pressed, and the builder has stopped.
            OutputError: the timing cache cannot be written.
        """
        options = options or BuildOptions()
        profiles = (profiles,) if isinstance(profiles, Profile) else tuple(profiles)
        config = configure(self.package.module, self._builder, options, compute_capabilities)
        if self.input_shape[0] == -1:
            for profile in profiles:
                self._add(profile, config)
        cache = TimingCache(options.timing_cache, self.package.messages) if options.timing_cache else None
        if cache is not None:
            cache.attach(config)
        self.package.messages.errors.clear()
        with watched(self.package.module, config, f"building for {self.package.title}", progress):
            engine = self._builder.build_serialized_network(self._network, config)
        if engine is None:
            reason = building(self.package.messages.errors, self.graph)
            raise BuildError(f"{self.package.version} cannot build the network: {reason}")
        if cache is not None:
            cache.keep(config)
        return bytes(engine)

    def _outputs(self) -> Iterator[tuple[Any, Any]]:
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            yield from ((layer, layer.get_output(i)) for i in range(layer.num_outputs))

    def _add(self, profile: Profile, config: Any) -> None:
        optimisation = self._builder.create_optimization_profile()
        batches = (profile.smallest, profile.best, profile.largest)
        name = self._network.get_input(0).name
        optimisation.set_shape(name, *((batch, *self.input_shape[1:]) for batch in batches))
        if config.add_optimization_profile(optimisation) < 0:
            raise BuildError(f"{self.package.version} takes no optimisation profile of {profile}")


def _strongly_typed(trt: ModuleType) -> int:
    """The creation flag; without it networks of TensorRT 10 are weakly typed."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
