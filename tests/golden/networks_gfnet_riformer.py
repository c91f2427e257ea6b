"""RIFormer, the global filter and GFNet: cases 04 and 08."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.case import Case
from tests.golden.fill import filled
from vmkd_fx.models.affine_mixer import AffineMixer, merged_into_norm
from vmkd_fx.models.gfnet import GFNet, GFNetPyramid
from vmkd_fx.models.global_filter import GlobalFilter
from vmkd_fx.models.riformer import RIFormer, checkpoint_filter_fn


def replay_riformer(case: Case) -> dict[str, Tensor]:
    """The backbone in training form, its mixers merged into norms, and the backbone in deployed form."""
    given = case.state()
    merged = dict(_merged(given))
    kept = {key: value for key, value in given.items() if ".norm1." not in key and ".affine." not in key}
    found = {f"deploy_sd/{key}": value for key, value in merged.items()}
    for form, mixer, weights in (
        ("normal", AffineMixer, given),
        ("deploy", nn.Identity, {**kept, **merged}),
    ):
        values = _backbone(case, mixer, weights)
        found |= {f"out/{form}/{name}": value for name, value in values.items()}
    return {name: found[name] for name in case.results}


def _merged(given: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for key in given:
        if key.endswith(".token_mixer.affine.weight"):
            block = key.removesuffix(".token_mixer.affine.weight")
            mixer = f"{block}.token_mixer.affine"
            norm = given[f"{block}.norm1.weight"], given[f"{block}.norm1.bias"]
            weight, bias = merged_into_norm(*norm, given[f"{mixer}.weight"].flatten(), given[f"{mixer}.bias"])
            yield f"{block}.norm_reparam.weight", weight
            yield f"{block}.norm_reparam.bias", bias


def _backbone(case: Case, mixer: type[nn.Module], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by the authors' names: `network` counts stages and the downsamplings between them."""
    config, images = case.config, case.arrays["in/x"]
    model = RIFormer(
        config["layers"],
        config["embed_dims"],
        mixer,
        config.get("mlp_ratios", 4.0),
        in_chans=images.shape[1],
        num_classes=0,
    )
    last = 2 * len(config["layers"]) - 2
    own = {
        key: value for key, value in weights.items() if not key.startswith("norm") or f"norm{last}." in key
    }
    paths = {"patch_embed": "stem"}
    for index in range(last + 1):
        stage = f"stages.{(index + 1) // 2}"
        paths[f"network{index}"] = f"{stage}.downsample" if index % 2 else f"{stage}.blocks"
    _load(model, checkpoint_filter_fn(own, model.double()))
    found = _outputs(model, paths, images)
    for index in range(last + 1):
        if f"norm{index}.weight" in weights:
            norm = type(model.head.norm)(len(weights[f"norm{index}.weight"])).double()
            _load(norm, {name: weights[f"norm{index}.{name}"] for name in ("weight", "bias")})
            found[f"final_norm{index}"] = norm(found[f"network{index}"])
    return found


def replay_global_filter(case: Case) -> dict[str, Tensor]:
    """The op and its gradients in float64, and once in float32."""
    config, x = case.config, case.arrays["in/x"].clone().requires_grad_()
    filters = GlobalFilter(config["dim"], (config["H"], config["W"])).double()
    _load(filters, case.state())
    y = filters(x)
    y.backward(case.arrays["in/gy"])
    gradients = {"grad/x": x.grad, "grad/complex_weight": filters.complex_weight.grad}
    single = copy.deepcopy(filters).float()(x.float())
    found = {"out/y": y, "out/y_float32_as_is": single, **gradients}
    return {name: found[name] for name in case.results}


def replay_gfnet(case: Case) -> dict[str, Tensor]:
    """The outputs of embeddings, blocks or stages, and the final norm, and the logits."""
    model = _gfnet(case.config, case.state())
    return {f"out/{name}": value for name, value in _tokens_and_logits(model, case).items()}


def replay_gfnet_fill(case: Case) -> dict[str, Tensor]:
    """The same with weights by the rule: mean and deviation over tokens instead of whole outputs."""
    found = {}
    for name, value in _tokens_and_logits(_gfnet(case.config, filled(case.meta)), case).items():
        if name == "logits":
            found["out/logits"] = value
        else:
            found[f"out/{name}_tokmean"] = value.mean(1)
            found[f"out/{name}_tokstd"] = value.std(1, unbiased=False)
    return found


def _gfnet(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    named = {"img": "img_size", "patch": "patch_size", "embed_dim": "embed_dim", "depth": "depth"}
    named |= {"mlp_ratio": "mlp_ratio", "num_classes": "num_classes"}
    settings = {ours: config[theirs] for theirs, ours in named.items() if theirs in config}
    kind = {"GFNet": GFNet, "GFNetPyramid": GFNetPyramid}[config["arch"]]
    scaled = any(key.endswith(".gamma") for key in weights)
    model = kind(**settings, layer_scale=1.0 if scaled else None).double()
    _load(model, weights)
    return model


def _tokens_and_logits(model: nn.Module, case: Case) -> dict[str, Tensor]:
    def children(name: str) -> dict[str, str]:
        return {f"{name}{index}": f"{name}.{index}" for index in range(len(getattr(model, name)))}

    flat = not isinstance(model.patch_embed, nn.ModuleList)
    paths = {"patch_embed": "patch_embed"} if flat else children("patch_embed")
    paths |= {**children("blocks"), "norm": "norm", "logits": ""}
    return _outputs(model, paths, case.arrays["in/x"])


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        module.load_state_dict(weights, strict=True)


@torch.no_grad()
def _outputs(model: nn.Module, paths: dict[str, str], images: Tensor) -> dict[str, Tensor]:
    """What the submodules at these paths return in one run of the model in eval()."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, value: found.__setitem__(name, value)

    handles = [model.get_submodule(path).register_forward_hook(record(name)) for name, path in paths.items()]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "04_riformer": replay_riformer,
    "08a_globalfilter": replay_global_filter,
    "08b_gfnet_small": replay_gfnet,
    "08c_gfnet_fill": replay_gfnet_fill,
}
