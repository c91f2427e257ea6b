"""Cases of involution, RedNet, Cycle FC and CycleMLP, replayed through this project's models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import timm
import torch
from torch import Tensor, nn

from tests.golden.case import Case
from tests.golden.fill import fill_value
from vmkd_fx.models.cycle_fc import CycleFC
from vmkd_fx.models.cycle_mlp import CycleMlp
from vmkd_fx.models.cycle_mlp import checkpoint_filter_fn as cycle_names
from vmkd_fx.models.involution import Involution2d
from vmkd_fx.models.rednet import checkpoint_filter_fn as rednet_names

_INVOLUTION_NAMES = {"conv1.conv": "reduce", "conv1.bn": "norm", "conv2.conv": "span"}


def replay_involution(case: Case) -> dict[str, Tensor]:
    """Output and kernels in eval(), gradients of sum(y * gy), output with the batch's statistics."""
    config = case.config
    layer = Involution2d(config["channels"], config["kernel"], config["stride"]).double().eval()
    theirs = {_ours(name): name for name in case.state()}
    layer.load_state_dict({ours: case.arrays[f"sd/{name}"] for ours, name in theirs.items()})
    x = case.arrays["in/x"].clone().requires_grad_()
    y = layer(x)
    (y * case.arrays["in/gy"]).sum().backward()
    found = {"out/eval/y": y, "out/eval/kernel": layer.kernels(x), "grad/x": _gradient(x)}
    for name, parameter in layer.named_parameters():
        found[f"grad/sd/{theirs[name]}"] = _gradient(parameter)
    found["out/train/y"] = layer.train()(x)
    return found


def _ours(name: str) -> str:
    part, _, last = name.rpartition(".")
    return f"{_INVOLUTION_NAMES[part]}.{last}"


def replay_rednet(case: Case) -> dict[str, Tensor]:
    """Weights by the fill rule, running statistics from the file."""
    model = timm.create_model(f"rednet{case.config['depth']}", num_classes=case.config["num_classes"])
    state = {**_filled(case), **case.state()}
    model.double().eval().load_state_dict(rednet_names(state, model))
    seen, logits = _run(model, case.arrays["in/x"], ("stem", "maxpool", *(f"layer{i}" for i in range(1, 5))))
    return {"out/logits": logits, **_statistics(seen, (2, 3))}


def replay_cycle_fc(case: Case) -> dict[str, Tensor]:
    """Output and gradients; theirs is (B, C, H, W) with a weight (O, C, 1, 1)."""
    config, weight = case.config, case.arrays["sd/weight"]
    layer = CycleFC(config["in"], config["out"], tuple(config["kernel"])).double()
    layer.load_state_dict({"weight": weight.flatten(1), "bias": case.arrays["sd/bias"]})
    x = case.arrays["in/x"].clone().requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (y * case.arrays["in/gy"]).sum().backward()
    return {
        "out/y": y,
        "grad/x": _gradient(x),
        "grad/weight": _gradient(layer.weight).reshape(weight.shape),
        "grad/bias": _gradient(layer.bias),
    }


def replay_cycle_mlp(case: Case) -> dict[str, Tensor]:
    """A network of any size with stored weights: the map after every part."""
    config = case.config
    sizes = {key: tuple(config[key]) for key in ("layers", "embed_dims", "mlp_ratios")}
    model = CycleMlp(**sizes, num_classes=config["num_classes"])
    seen, logits = _run_cycle_mlp(model, case, case.state())
    return {"out/logits": logits, **{f"out/{name}": value for name, value in seen.items()}}


def replay_cycle_mlp_filled(case: Case) -> dict[str, Tensor]:
    """CycleMLP-B1, or the variant that the case is named after, with weights by the fill rule."""
    variant = case.name.removeprefix("07c_cyclemlp_").removesuffix("_fill")
    model = timm.create_model(f"cycle_mlp_{variant}", num_classes=case.config["num_classes"])
    seen, logits = _run_cycle_mlp(model, case, _filled(case))
    return {"out/logits": logits, **_statistics(seen, (1, 2))}


def _run_cycle_mlp(
    model: nn.Module, case: Case, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The maps by the authors' names: network0, a stage's blocks; network1, the next downsampling; ..."""
    model.double().eval().load_state_dict(cycle_names(state, model))
    names = {"patch_embed": "patch_embed"}
    for stage in range(len(model.stages)):
        names[f"stages.{stage}.blocks"] = f"network{2 * stage}"
        if stage:
            names[f"stages.{stage}.downsample"] = f"network{2 * stage - 1}"
    seen, logits = _run(model, case.arrays["in/x"], names)
    return {names[path]: value for path, value in seen.items()}, logits


def _filled(case: Case) -> dict[str, Tensor]:
    fill = case.meta["fill"]
    keys = {key: shape for key, shape in fill["state_dict_keys"].items() if not key.endswith(".offset")}
    return {key: fill_value(fill["salt"], key, tuple(shape)) for key, shape in keys.items()}


@torch.no_grad()
def _run(model: nn.Module, x: Tensor, paths: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
    """What the modules at `paths` return, and the logits."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _, __, result, path=path: seen.__setitem__(path, result)
        )
        for path in paths
    ]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    return seen, logits


def _statistics(maps: dict[str, Tensor], axes: tuple[int, int]) -> dict[str, Tensor]:
    found = {}
    for name, value in maps.items():
        found[f"out/{name}_chmean"] = value.mean(axes)
        found[f"out/{name}_chstd"] = value.std(axes, correction=0)
    return found


def _gradient(tensor: Tensor | None) -> Tensor:
    assert tensor is not None and tensor.grad is not None
    return tensor.grad


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "06a_involution": replay_involution,
    "06b_rednet_fill": replay_rednet,
    "07a_cyclefc": replay_cycle_fc,
    "07b_cyclenet_small": replay_cycle_mlp,
    "07c_cyclemlp_b1_fill": replay_cycle_mlp_filled,
}
