"""Other heads, channels, image sizes and pools of timm's models; torchvision's models; plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn

import vmkd_fx as vx
from tests.checks import assert_computes_the_same
from tests.models import small
from tests.slow import rest_slow
from vmkd_fx.graph.traced import TracedModule


def images(channels: int, height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def assert_right(model: nn.Module, *size: int) -> TracedModule:
    """Traced for images of `size`, the graph computes what the model does."""
    graph = vx.trace(copy.deepcopy(model), input_size=size)
    assert_computes_the_same(graph, model, images(*size))
    return graph


NAMES = ("test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_mambaout", "test_nfnet")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_head(name: str) -> None:
    model = timm.create_model(name, num_classes=0, drop_path_rate=0.1)
    graph = assert_right(model, 3, *_size(name))
    assert graph.info.num_classes == 0


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", rest_slow(NAMES, 2))
def test_other_channels(name: str, channels: int) -> None:
    model = timm.create_model(name, num_classes=10, in_chans=channels, drop_path_rate=0.1)
    graph = vx.trace(model)
    assert graph.info.need_input_size()[0] == channels
    assert_right(model, channels, *_size(name))


def _size(name: str) -> tuple[int, int]:
    return (160, 160) if "vit" in name else (64, 64)


VITS = ("test_vit", "vit_tiny_patch16_dinov3_qkvb", "pit_ti_224", "test_vit_relpos")


@pytest.mark.parametrize("edges", [(32, 32), (64, 96)])
@pytest.mark.parametrize("name", rest_slow(VITS, 2))
def test_another_image_size_of_a_transformer(name: str, edges: tuple[int, int]) -> None:
    model = timm.create_model(name, num_classes=10, img_size=edges, drop_rate=0.1)
    assert vx.trace(model).info.need_input_size()[1:] == edges
    assert_right(model, 3, *edges)


def test_image_sizes_that_a_transformer_takes_as_they_come() -> None:
    model = timm.create_model("test_vit", num_classes=10, dynamic_img_size=True)
    for edges in ((160, 160), (64, 96)):
        assert_right(model, 3, *edges)


POOLS = (
    *(("test_resnet", pool) for pool in ("", "avg", "max", "avgmax", "catavgmax", "fast")),
    *(("test_convnext", pool) for pool in ("", "avg", "max")),
    *(("test_efficientnet", pool) for pool in ("avg", "max", "avgmax")),
    *(("test_vit", pool) for pool in ("", "avg", "avgmax", "max", "token", "map")),
    *(("vit_tiny_patch16_dinov3_qkvb", pool) for pool in ("", "avg", "max", "token", "map")),
)


@pytest.mark.parametrize(("name", "pool"), rest_slow(POOLS, 12))
def test_pools(name: str, pool: str) -> None:
    sized = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=0 if pool in ("", "fast") else 10, global_pool=pool, **sized)
    assert_right(model, 3, 64, 64)


OPTIONS: dict[str, Callable[[], nn.Module]] = {
    "stochastic patches": lambda: timm.create_model(
        "test_vit", img_size=64, num_classes=10, pos_drop_rate=0.1
    ),
    "class attention": lambda: timm.create_model(
        "cait_xxs24_224", img_size=32, num_classes=10, drop_path_rate=0.1
    ),
    "two heads": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10),
    "feature pyramid": lambda: timm.create_model("test_resnet", features_only=True),
    "relative positions": lambda: timm.create_model(
        "beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=10
    ),
    "random coordinates": lambda: timm.create_model(
        "vit_base_patch16_sapiens2",
        img_size=32,
        depth=2,
        embed_dim=64,
        num_heads=2,
        num_kv_heads=2,
        num_classes=10,
    ),
    "drop block": lambda: timm.create_model("resnet10t", num_classes=10, drop_block_rate=0.1),
    "batch norm folded by scale": lambda: timm.create_model("test_nfnet", num_classes=10, drop_rate=0.1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    edge = 32 if name in ("class attention", "two heads", "relative positions", "random coordinates") else 64
    assert_right(OPTIONS[name](), 3, edge, edge)


def _small_vgg() -> nn.Module:
    model = tv.VGG(tv.vgg.make_layers([8, "M", 16, "M"], batch_norm=True), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 7 * 7, 10), nn.Dropout(0.1))
    return model


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (tv.resnet18, 64),
    "mobilenet_v3_small": (tv.mobilenet_v3_small, 64),
    "efficientnet_b0": (tv.efficientnet_b0, 32),
    "convnext_tiny": (tv.convnext_tiny, 32),
    "swin_t": (tv.swin_t, 64),
    "swin_v2_t": (tv.swin_v2_t, 64),
    "vit": (
        partial(
            tv.VisionTransformer,
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=24,
            mlp_dim=48,
            dropout=0.1,
            attention_dropout=0.1,
        ),
        32,
    ),
    "maxvit": (
        partial(
            tv.MaxVit,
            input_size=(64, 64),
            stem_channels=8,
            partition_size=2,
            block_channels=[8, 16],
            block_layers=[1, 1],
            head_dim=4,
            stochastic_depth_prob=0.1,
        ),
        64,
    ),
    "densenet121": (tv.densenet121, 32),
    "googlenet": (partial(tv.googlenet, aux_logits=False, init_weights=False), 64),
    "inception_v3": (partial(tv.inception_v3, aux_logits=False, init_weights=False), 96),
    "regnet_x_400mf": (tv.regnet_x_400mf, 32),
    "regnet_y_400mf": (tv.regnet_y_400mf, 32),
    "shufflenet_v2_x0_5": (tv.shufflenet_v2_x0_5, 32),
    "squeezenet1_1": (tv.squeezenet1_1, 64),
    "mnasnet0_5": (tv.mnasnet0_5, 32),
    "vgg": (_small_vgg, 32),
}


@pytest.mark.parametrize("name", rest_slow(TORCHVISION, 5))
def test_torchvision(name: str) -> None:
    make, edge = TORCHVISION[name]
    torch.manual_seed(0)
    model = make()
    model.num_classes = 1000
    assert_right(model, 3, edge, edge)


class Dictionary(nn.Module):
    """Returns a nested structure and takes an option."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in ("one", "two")})

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, object]:
        x = self.stem(x).mean((2, 3)) * scale
        return {"logits": {name: head(x) for name, head in self.heads.items()}, "features": [x, x * 2]}


class Parameters(nn.Module):
    """Parameters in lists and dictionaries, and one matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3))])
        self.dict = nn.ParameterDict({"bias": nn.Parameter(torch.randn(3))})
        self.tied = self.list[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) @ self.list[0] @ self.list[1] + self.dict["bias"]
        return x @ self.tied


class Recurrent(nn.Module):
    """Reads the rows of an image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(3, 4, batch_first=True, bidirectional=True, num_layers=2, dropout=0.1)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows, (hidden, _) = self.recurrent(x.mean(3).transpose(1, 2))
        attended, _ = self.attend(rows, rows, rows, need_weights=False)
        return self.head(attended.mean(1)) + hidden.mean()


def pooled(stem: nn.Module) -> nn.Module:
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(3600, 10)
    ),
    "nested outputs": Dictionary,
    "parameters in lists": Parameters,
    "recurrent": Recurrent,
    "encoder layer": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    ),
    "weight norm": lambda: pooled(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm": lambda: pooled(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules(name: str) -> None:
    torch.manual_seed(0)
    assert_right(PLAIN[name](), 3, 32, 32)


@pytest.mark.parametrize("family", ["mixer", "deit"])
def test_double_precision(family: str) -> None:
    model = small(family).double()
    graph = vx.trace(copy.deepcopy(model))
    assert_computes_the_same(graph, model, images(3, 32, 32).double())
