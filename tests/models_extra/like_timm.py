"""What timm's own tests ask of every model, for ours, and a meter of memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from timm.models import is_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vmkd_fx as vx
from tests.checks import assert_computes_the_same

Make = Callable[..., nn.Module]


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_configured(model: nn.Module) -> None:
    """The default configuration names real parameters and sizes."""
    config, state = model.default_cfg, model.state_dict()
    assert is_model(config["architecture"])
    assert config["input_size"] == (3, 224, 224)
    assert {f"{config['classifier']}.weight", f"{config['first_conv']}.weight"} <= state.keys()
    assert config["num_classes"] == state[f"{config['classifier']}.weight"].shape[0]
    assert model.get_classifier() is model.get_submodule(config["classifier"])


def assert_forward(make: Make, channels: int, dim: int) -> None:
    """Shapes of features, pooled features and logits; `dim` is the channels' axis of the features."""
    model, x = make(num_classes=10).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[dim] == model.num_features == channels
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(x))
        assert model(x).shape == (2, 10)
        model.reset_classifier(7)
        assert model.num_classes == 7 and model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, channels)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        assert make(num_classes=0)(x).shape == (2, channels)
        assert make(num_classes=4, in_chans=1)(x[:, :1]).shape == (2, 4)
        twice = make(num_classes=4, global_pool="catavgmax")
        assert twice.head_hidden_size == 2 * channels and twice(x).shape == (2, 4)


def assert_trains(make: Make) -> None:
    """Every parameter gets a gradient that is finite, and the same when activations are recomputed."""
    model, x = make(num_classes=10, drop_rate=0.1, drop_path_rate=0.1), images(4, 3, 64, 64)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients[0])
    assert any(bool(gradient.any()) for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def assert_features(make: Make, dim: int) -> None:
    """Feature maps agree with `feature_info`, by either of timm's extractors, and are the model's own."""
    x = images(2, 3, 64, 64)
    whole = make().eval()
    backbone = make(features_only=True).eval()
    backbone.load_state_dict(_flat(whole.state_dict(), backbone), strict=True)
    with torch.no_grad():
        maps = backbone(x)
        _, expected = whole.forward_intermediates(x)
    assert len(maps) == len(whole.feature_info) == len(expected)
    for value, info, own in zip(maps, whole.feature_info, expected, strict=True):
        assert value.shape[dim] == info["num_chs"]
        channels_first = value.movedim(dim, 1)
        assert channels_first.shape[2:] == (64 // info["reduction"], 64 // info["reduction"])
        assert torch.equal(channels_first, own)
    getter = make(features_only=True, feature_cls="getter", out_indices=(0, 2)).eval()
    assert [tuple(m.shape) for m in getter(x)] == [tuple(expected[i].shape) for i in (0, 2)]
    last, kept = whole.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(last.movedim(dim, 1), kept[0]) and torch.equal(kept[0], expected[1])


def _flat(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The whole model's weights by the names of the backbone, whose stages are children of its own."""
    known = backbone.state_dict().keys()
    flat = {name.replace("stages.", "stages_", 1): value for name, value in state.items()}
    return {name: value for name, value in flat.items() if name in known}


def assert_traces(make: Make) -> None:
    """The graph is the model, bit for bit, in both modes."""
    model = make(num_classes=10, drop_rate=0.1, drop_path_rate=0.1)
    assert_computes_the_same(vx.trace(copy.deepcopy(model)), model, images(2, 3, 64, 64))


def assert_exports(module: nn.Module, x: Tensor, path: Path) -> None:
    """ONNX Runtime computes the same from the exported file, for another batch than the exported one."""
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(module.eval(), (x[:2],), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = module(x)
    error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


def assert_runs_in_half(make: Make) -> None:
    model, x = make(num_classes=10).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for dtype, bound in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
            found = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert found.dtype == dtype
            assert (found - expected).abs().max() < bound * expected.abs().max()


def created(name: str) -> nn.Module:
    """The registered model, without memory."""
    with torch.device("meta"):
        return timm.create_model(name)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still alive.

    Attributes:
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
