"""Token mixing, decided from the graph and confirmed by the numbers: each kind of operation, then timm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.fx import Node

import vmkd_fx as vx
from tests.slow import rest_slow
from vmkd_fx.graph.anatomy import LOCATION_AXES, Branch
from vmkd_fx.graph.locations import Located
from vmkd_fx.graph.mixing import Mixing, mixes_tokens
from vmkd_fx.graph.perturb import Perturbed, mixes_when_perturbed
from vmkd_fx.graph.shapes import node_shapes
from vmkd_fx.graph.traced import TracedModule

TOKENS, CHANNELS, SIDE = 16, 8, 4
ANOTHER_LAYOUT = "the tensor that enters has another layout"
"""Why the anatomy does not ask about a branch."""


class Net(nn.Module):
    """A patch stem, the body between two marks, and a head."""

    def __init__(self, body: nn.Module, layout: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 8, 8)
        self.entry, self.body, self.end = nn.Identity(), body, nn.Identity()
        self.layout = layout

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        if self.layout == "NLC":
            x = x.flatten(2).transpose(1, 2)
        elif self.layout == "NHWC":
            x = x.permute(0, 2, 3, 1)
        return self.end(self.body(self.entry(x))).flatten(2).mean(1)[:, :4]


class Body(nn.Module):
    """A function as a module, with what it needs in `parts`."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.register_buffer("order", torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def verdicts(body: Callable[..., Tensor] | nn.Module, layout: str) -> tuple[Mixing, bool | None]:
    """What the graph says of a body, and what the numbers say (None where it does not compute)."""
    torch.manual_seed(0)
    module = body if isinstance(body, nn.Module) else Body(body)
    graph = vx.trace(Net(module, layout).eval(), input_size=(3, 8 * SIDE, 8 * SIDE))
    nodes = {node.name: node for node in graph.graph.nodes}
    names = list(nodes)
    inside = [nodes[name] for name in names[names.index("entry") + 1 : names.index("end") + 1]]
    axes = LOCATION_AXES[layout]
    from_graph = mixes_tokens(graph, node_shapes(graph), inside, nodes["entry"], axes)
    return from_graph, mixes_when_perturbed(graph, inside, nodes["entry"], axes)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def written(x: Tensor, _: Body) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def written_through_a_view(x: Tensor, _: Body) -> Tensor:
    y = torch.zeros(x.shape[0], TOKENS, CHANNELS, dtype=x.dtype)
    view = y.transpose(1, 2)
    view[:, :, 1:] = x.transpose(1, 2)[:, :, :-1]
    return y


def written_to_all(x: Tensor, _: Body) -> Tensor:
    y = torch.zeros_like(x)
    y[:] = x[0, 0, 0]
    return y


def written_where_it_was(x: Tensor, _: Body) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y[:, 1:] = 2 * x[:, 1:]
    return y


def windows(work: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Body], Tensor]:
    def body(x: Tensor, _: Body) -> Tensor:
        inside = work(window_partition(x, (2, 2)).flatten(1, 2))
        return window_reverse(inside.reshape(-1, 2, 2, CHANNELS), (2, 2), SIDE, SIDE)

    return body


def shifted_windows(x: Tensor, body: Body) -> Tensor:
    return windows(lambda y: 2 * y)(x.roll((-1, -1), (1, 2)), body).roll((1, 1), (1, 2))


def rotated(x: Tensor, _: Body) -> Tensor:
    embedding = torch.linspace(0, 1, TOKENS * 2 * CHANNELS, dtype=torch.float64).view(TOKENS, 2 * CHANNELS)
    return apply_rot_embed_cat(x, embedding.to(x.dtype))


def scan(x: Tensor, _: Body) -> Tensor:
    state, out = torch.zeros_like(x[:, 0]), []
    for step in range(TOKENS):
        state = 0.5 * state + x[:, step]
        out.append(state)
    return torch.stack(out, 1)


def recurrent(kind: type[nn.Module], along: str) -> Body:
    if along == "tokens":
        return Body(lambda x, body: body.parts[0](x)[0], kind(CHANNELS, CHANNELS, batch_first=True))
    return Body(
        lambda x, body: body.parts[0](x.reshape(-1, CHANNELS, 1))[0].reshape(x.shape),
        kind(1, 1, batch_first=True),
    )


def heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], TOKENS, 2, CHANNELS // 2)


def product(left: str, right: str, result: str) -> Callable[[Tensor, Body], Tensor]:
    return lambda x, _: torch.einsum(f"{left},{right}->{result}", x, torch.softmax(x, -1))


def squeezed(x: Tensor, _: Body) -> Tensor:
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


ON_TOKENS: dict[str, tuple[Callable[..., Tensor] | nn.Module, str | None]] = {
    "linear": (nn.Linear(CHANNELS, CHANNELS), None),
    "linear over tokens": (
        Body(lambda x, b: b.parts[0](x.transpose(1, 2)).transpose(1, 2), nn.Linear(TOKENS, TOKENS)),
        "linear over tokens",
    ),
    "layer norm": (nn.LayerNorm(CHANNELS), None),
    "layer norm over both": (nn.LayerNorm((TOKENS, CHANNELS)), "norm over tokens"),
    "rms norm": (nn.RMSNorm(CHANNELS), None),
    "softmax over channels": (lambda x, _: x.softmax(-1), None),
    "softmax over tokens": (lambda x, _: x.softmax(1), "softmax over tokens"),
    "normalize channels": (lambda x, _: F.normalize(x, dim=-1), None),
    "normalize tokens": (lambda x, _: F.normalize(x, dim=1), "pooling"),
    "mean over channels": (lambda x, _: x * x.mean(-1, keepdim=True), None),
    "mean over tokens": (lambda x, _: x * x.mean(1, keepdim=True), "pooling"),
    "maximum over tokens": (lambda x, _: x + x.max(1, keepdim=True)[0], "pooling"),
    "variance over tokens": (lambda x, _: x / (1 + x.var(1, keepdim=True)), "pooling"),
    "cumulative sum over channels": (lambda x, _: x.cumsum(-1), None),
    "cumulative sum over tokens": (lambda x, _: x.cumsum(1), "scan over tokens"),
    "state space scan": (scan, "tokens meet others"),
    "sort of channels": (lambda x, _: x.sort(-1)[0], None),
    "sort of tokens": (lambda x, _: x.sort(1)[0], "sorting of tokens"),
    "Fourier transform of channels": (lambda x, _: torch.fft.rfft(x, dim=-1).abs().repeat(1, 1, 2), None),
    "Fourier transform of tokens": (
        lambda x, _: torch.fft.fft(x, dim=1).abs(),
        "Fourier transform over tokens",
    ),
    "roll": (lambda x, _: x.roll(1, 1), "tokens change places"),
    "roll and back": (lambda x, _: (2 * x.roll(1, 1)).roll(-1, 1), None),
    "flip": (lambda x, _: x.flip(1), "tokens change places"),
    "flip of channels": (lambda x, _: x.flip(-1), None),
    "sum with a flip": (lambda x, _: (x + x.flip(1)).flip(1), "tokens meet others"),
    "padding cut off": (lambda x, _: (2 * F.pad(x, (0, 0, 2, 1)))[:, 2:-1], None),
    "padding cut off elsewhere": (lambda x, _: F.pad(x, (0, 0, 2, 1))[:, 1:-2], "tokens change places"),
    "permutation": (lambda x, b: x[:, b.order], "tokens change places"),
    "permutation and back": (lambda x, b: F.gelu(x[:, b.order])[:, b.order.argsort()], None),
    "halves swapped": (lambda x, _: torch.cat([x[:, 8:], x[:, :8]], 1), "tokens change places"),
    "halves put together": (lambda x, _: torch.cat([x[:, :8], 2 * x[:, 8:]], 1), None),
    "channel chunks multiplied": (lambda x, _: (lambda a, b: (a * b).repeat(1, 1, 2))(*x.chunk(2, -1)), None),
    "token chunks multiplied": (lambda x, _: (lambda a, b: (a * b).repeat(1, 2, 1))(*x.chunk(2, 1)),
                                "tokens meet others"),
    "first token for all": (lambda x, _: x[:, :1].expand(-1, TOKENS, -1), "tokens change places"),
    "stack and unbind": (lambda x, _: torch.stack([x, 2 * x], 2).unbind(2)[1].clamp(-1, 1), None),
    "reshape that scrambles": (
        Body(lambda x, b: b.parts[0](x.reshape(-1, CHANNELS, TOKENS)).reshape(x.shape),
             nn.Linear(TOKENS, TOKENS)),
        "linear over tokens",
    ),
    "reshape and back": (lambda x, _: (2 * x.reshape(-1, CHANNELS, TOKENS)).reshape(x.shape), None),
    "rotary embedding": (rotated, None),
    "gated linear unit": (lambda x, _: F.glu(x).repeat(1, 1, 2), None),
    "attention": (lambda x, _: attention(x), "attention"),
    "attention between heads": (lambda x, _: attention(heads(x)).reshape(x.shape), None),
    "attention of channels": (
        lambda x, _: attention(x.transpose(1, 2)).transpose(1, 2), "attention",
    ),
    "multi-head attention": (
        Body(lambda x, b: b.parts[0](x, x, x)[0], nn.MultiheadAttention(CHANNELS, 2, batch_first=True)),
        "attention",
    ),
    "products by hand": (lambda x, _: (x @ x.transpose(1, 2)).softmax(-1) @ x, "matrix product over tokens"),
    "einsum of heads": (product("bnc", "bnd", "bnd"), None),
    "einsum of tokens": (product("bnc", "bmc", "bnc"), "pooling"),
    "LSTM along tokens": (recurrent(nn.LSTM, "tokens"), "recurrence"),
    "LSTM along channels": (recurrent(nn.LSTM, "channels"), None),
    "GRU along tokens": (recurrent(nn.GRU, "tokens"), "recurrence"),
    "GRU along channels": (recurrent(nn.GRU, "channels"), None),
    "written one further": (written, "tokens change places"),
    "written one further through a view": (written_through_a_view, "tokens change places"),
    "written from one place to all": (written_to_all, "tokens change places"),
    "written where it was": (written_where_it_was, None),
    "in place": (lambda x, _: x.clone().mul_(2).add_(x), None),
    "in place with others": (lambda x, _: x.clone().add_(x.flip(1)), "tokens meet others"),
    "distances": (lambda x, _: torch.cdist(x, x) @ x, "distance between tokens"),
    "nothing of it": (lambda x, _: torch.zeros_like(x), None),
    "nothing at all": (nn.Identity(), None),
}  # fmt: skip

ON_MAPS: dict[str, tuple[Callable[..., Tensor] | nn.Module, str | None]] = {
    "1x1 convolution": (nn.Conv2d(CHANNELS, CHANNELS, 1), None),
    "3x3 convolution": (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), "3x3 convolution"),
    "1x3 convolution": (nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding=(0, 1)), "1x3 convolution"),
    "depthwise convolution": (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=8), "3x3 convolution"),
    "a kernel wider than the map": (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=4, dilation=4), None),
    "1x1 with stride": (nn.Conv2d(CHANNELS, CHANNELS, 1, stride=2), None),
    "2x2 with stride": (nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2), "2x2 convolution"),
    "transposed 2x2": (nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2), None),
    "transposed 3x3": (nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1), "3x3 convolution"),
    "1d convolution of channels": (
        Body(lambda x, b: b.parts[0](x.flatten(2).transpose(1, 2).flatten(0, 1)[:, None]).reshape(
            x.shape[0], -1, CHANNELS).transpose(1, 2).reshape(x.shape), nn.Conv1d(1, 1, 3, padding=1)), None),
    "convolution over tokens as channels": (
        Body(lambda x, b: b.parts[0](x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape),
             nn.Conv1d(TOKENS, TOKENS, 1)), "convolution over tokens as channels"),
    "batch norm": (nn.BatchNorm2d(CHANNELS), None),
    "batch norm of this batch": (nn.BatchNorm2d(CHANNELS, track_running_stats=False), "norm over tokens"),
    "group norm": (nn.GroupNorm(2, CHANNELS), "norm over tokens"),
    "instance norm": (nn.InstanceNorm2d(CHANNELS), "norm over tokens"),
    "average pooling": (nn.AvgPool2d(3, 1, 1), "pooling"),
    "maximum pooling": (nn.MaxPool2d(3, 1, 1), "pooling"),
    "pooling with nothing to pool": (nn.AvgPool2d(1), None),
    "adaptive pooling": (Body(lambda x, _: x * F.adaptive_avg_pool2d(x, 1)), "pooling"),
    "adaptive pooling to the same size": (nn.AdaptiveAvgPool2d(SIDE), None),
    "squeeze and excitation": (squeezed, "pooling"),
    "gate of channels": (lambda x, _: x * torch.sigmoid(x.mean(1, keepdim=True)), None),
    "up and down": (lambda x, _: F.interpolate(x, scale_factor=2)[:, :, ::2, ::2], None),
    "bilinear": (lambda x, _: F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, ::2, ::2],
                 "interpolation"),
    "pixels shuffled and back": (lambda x, _: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), None),
    "pixels unshuffled": (
        Body(lambda x, b: F.pixel_shuffle(b.parts[0](F.pixel_unshuffle(x, 2)), 2),
             nn.Conv2d(4 * CHANNELS, 4 * CHANNELS, 1)), "convolution over tokens as channels"),
    "patches and back": (lambda x, _: F.fold(2 * F.unfold(x, 2, stride=2), (SIDE, SIDE), 2, stride=2), None),
    "overlapping patches and back": (
        lambda x, _: F.fold(F.unfold(x, 3, padding=1), (SIDE, SIDE), 3, padding=1), None),
    "patches summed": (lambda x, _: F.unfold(x, 3, padding=1).reshape(-1, CHANNELS, 9, SIDE, SIDE).sum(2),
                       "pooling"),
    "rows for columns": (lambda x, _: x.transpose(2, 3), "tokens change places"),
    "padding and crop": (lambda x, _: F.pad(x, (0, 2, 0, 2))[:, :, :SIDE, :SIDE], None),
}  # fmt: skip

ON_LAST: dict[str, tuple[Callable[..., Tensor] | nn.Module, str | None]] = {
    "windows": (windows(lambda x: x.softmax(-1)), None),
    "attention in windows": (windows(attention), "attention"),
    "shifted windows": (shifted_windows, None),
    "linear": (nn.Linear(CHANNELS, CHANNELS), None),
}

CASES = [
    pytest.param(layout, body, by, id=f"{layout}, {name}")
    for layout, cases in (("NLC", ON_TOKENS), ("NCHW", ON_MAPS), ("NHWC", ON_LAST))
    for name, (body, by) in cases.items()
]


@pytest.mark.parametrize(("layout", "body", "by"), CASES)
def test_each_kind_of_operation(layout: str, body: Callable[..., Tensor] | nn.Module, by: str | None) -> None:
    from_graph, from_numbers = verdicts(body, layout)
    assert from_graph == Mixing(by is not None, by or "")
    assert from_numbers is (by is not None)


def test_what_is_not_understood_is_not_guessed() -> None:
    from_graph, _ = verdicts(lambda x, _: torch.linalg.svd(heads(x))[1].repeat(1, 1, 4), "NLC")
    assert from_graph == Mixing(None, "_linalg_svd is not understood")
    from_graph, _ = verdicts(lambda x, _: x.gather(2, x.argsort(2)), "NLC")
    assert from_graph.mixes is None
    assert "index whose numbers are not known" in from_graph.by


class Closed(nn.Module):
    """A module that cannot be opened, for it takes other steps in training."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.softmax(1) if self.training else 2 * x.roll(self.shift, 1)


@pytest.mark.parametrize(("shift", "mixes"), [(0, False), (1, True)])
def test_a_closed_module_is_looked_into(shift: int, mixes: bool) -> None:
    net = Net(Closed(shift), "NLC").eval()
    graph = vx.trace(net, input_size=(3, 8 * SIDE, 8 * SIDE))
    assert [closed.path for closed in graph.closed] == ["body"]
    nodes = {node.name: node for node in graph.graph.nodes}
    verdict = mixes_tokens(graph, node_shapes(graph), [nodes["body"]], nodes["entry"], frozenset({1}))
    assert verdict.mixes is mixes
    assert not isinstance(getattr(net.body, "seen", None), Located)
    assert not isinstance(getattr(graph.get_submodule("body"), "seen", None), Located)


def test_half_precision_hides_nothing() -> None:
    graph = vx.trace(Net(nn.Linear(CHANNELS, CHANNELS), "NLC").half().eval(), input_size=(3, 128, 128))
    nodes = {node.name: node for node in graph.graph.nodes}
    verdict = mixes_tokens(graph, node_shapes(graph), [nodes["body"]], nodes["entry"], frozenset({1}))
    assert verdict == Mixing(False)


def test_the_model_stays_as_it_was() -> None:
    model = timm.create_model("test_vit").eval()
    graph = vx.trace(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (block, *_) = vx.anatomy(graph).blocks
    random = torch.get_rng_state()
    branches = [(branch.body, branch.norm or branch.stream, frozenset({1})) for branch in block.branches]
    assert Perturbed(graph).mixes(branches) == [True, False]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The smallest model of each of timm's families.
QUICK = (
    "test_byobnet", "test_convnext", "cpubone_nano", "cs3darknet_focus_s", "cspnext_tiny", "dla46x_c",
    "dpn48b", "test_efficientnet", "fasternet_t0", "hardcorenas_b", "hgnetv2_b0", "inception_next_atto",
    "lcnetv2_small", "test_mambaout", "test_coatnet", "mobilenetv3_small_050", "test_nfnet", "regnetx_002",
    "test_resnet", "legacy_seresnet18", "shvit_s1", "starnet_s050", "visformer_tiny", "test_vit",
    "vit_tiny_r_s16_p8_224", "test_vit_relpos", "ese_vovnet19b_slim_dw",
)  # fmt: skip
SLOW = (
    "halonet_h1", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32", "crossvit_tiny_240",
    "csatv2", "davit_tiny", "densenet121", "efficientformer_l1", "efficientvit_b0", "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb", "focalnet_tiny_srf", "gcvit_xxtiny", "hiera_tiny_224",
    "sam2_hiera_tiny", "hrnet_w18_small", "adv_inception_v3", "lowformer_b0", "poolformerv2_s12",
    "gmlp_ti16_224", "mobilevit_xxs", "mvitv2_tiny", "jx_nest_tiny", "nextvit_small", "rdnet_tiny",
    "repvit_m1", "res2next50", "selecsls42", "sequencer2d_s", "skresnet18", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vitamin_small_224", "volo_d1_224",
    "legacy_xception", "xception41p", "xcit_nano_12_p8_224", "deit_tiny_patch16_224", "edgenext_xx_small",
    "efficientformerv2_s0", "efficientvim_m1", "fastvit_t8", "ghostnet_050", "iformer_t", "levit_128s",
    "pit_ti_224", "pvt_v2_b0", "repghostnet_050", "resnest14d", "resnetv2_18", "rexnet_100",
)  # fmt: skip
LARGE = (
    "beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "ens_adv_inception_resnet_v2",
    "inception_v4", "mobilenetv5_base", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "pnasnet5large", "qwen3_vit_88m", "vgg11", "samvit_base_patch16_224",
)  # fmt: skip


def hold_against_each_other(name: str, one_of_a_kind: bool) -> int:
    """Ask the graph and the numbers about a model's branches and return how many."""
    torch.manual_seed(0)
    graph = vx.trace(timm.create_model(name).eval())
    nodes, shapes = {node.name: node for node in graph.graph.nodes}, node_shapes(graph)
    asked: dict[object, tuple[Branch, frozenset[int]]] = {}
    for block in vx.anatomy(graph).blocks:
        for branch in block.branches:
            entry = nodes[branch.norm or branch.stream]
            if branch.mixing.by == ANOTHER_LAYOUT:
                continue
            axes = LOCATION_AXES["NLC" if len(shapes[entry]) == 3 else block.layout]
            kinds = tuple(kind_of(graph, nodes[node]) for node in branch.body)
            asked.setdefault((kinds, axes) if one_of_a_kind else branch, (branch, axes))
    answers = Perturbed(graph).mixes(
        [(branch.body, branch.norm or branch.stream, axes) for branch, axes in asked.values()]
    )
    for (branch, _), answer in zip(asked.values(), answers, strict=True):
        assert branch.mixing.mixes is answer, f"{name}, {branch}: the numbers say {answer}"
    return len(answers)


def kind_of(graph: TracedModule, node: Node) -> object:
    return type(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target


@pytest.mark.parametrize("name", rest_slow(QUICK, 10))
def test_graph_and_numbers_agree(name: str) -> None:
    assert hold_against_each_other(name, one_of_a_kind=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK + SLOW)
def test_graph_and_numbers_agree_on_every_branch(name: str) -> None:
    assert hold_against_each_other(name, one_of_a_kind=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_no_branch_of_a_large_model_is_unclear(name: str) -> None:
    with torch.device("meta"):
        graph = vx.trace(timm.create_model(name).eval())
    found = [branch for block in vx.anatomy(graph).blocks for branch in block.branches]
    assert found
    assert not [b for b in found if b.mixing.mixes is None and b.mixing.by != ANOTHER_LAYOUT]


def test_two_places_may_reach_one_by_channels_of_their_own() -> None:
    def halves(x: Tensor, body: nn.Module) -> Tensor:
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return torch.cat([x[:, :2, ::2, ::2], shifted[:, 2:, ::2, ::2]], dim=1)

    found, seen = verdicts(Body(halves), "NCHW")
    assert found.mixes is True
    assert seen is True
