"""The third-party STD Mixer of case 09a: names and shapes are theirs, the arithmetic ours and timm's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import vmkd_fx as vx
from tests.golden.case import Case
from tests.golden.fill import filled
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.passes.feature_taps import TapConfig, inject_feature_taps
from vmkd_fx.passes.prediction import predicted
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

NAMES = {
    r"per_patch_fc": "stem.proj",
    r"ln": "norm",
    r"classifier": "head",
    r"classifier_dist\.(\d+)": r"vmkd.std.teacher_\1.head",
    r"mixer_blocks\.(\d+)\.token_mixer\.norm": r"blocks.\1.norm1",
    r"mixer_blocks\.(\d+)\.token_mixer\.fn\.dense(\d)": r"blocks.\1.mlp_tokens.fc\2",
    r"mixer_blocks\.(\d+)\.channel_mixer\.norm": r"blocks.\1.norm2",
    r"mixer_blocks\.(\d+)\.channel_mixer\.fn\.dense(\d)": r"blocks.\1.mlp_channels.fc\2",
}
BESIDE = {
    r"mixer_blocks\.(\d+)\.(spatial|channel)_dist_norm": r"norm_\2",
    r"mixer_blocks\.(\d+)\.(spatial|channel)_dist\.dense(\d)": r"mlp_\2.fc\3",
}
"""What every block of theirs owns, and those use that tokens stand beside."""


def replay_mixer(case: Case) -> dict[str, Tensor]:
    images, config = case.arrays["in/x"], case.config
    weights = filled(case.meta) if "fill" in case.meta else case.state()
    places = _places(config["depth"], config["distill_intermediate"])
    module = _with_tokens(case, places)
    module.load_state_dict(_renamed(weights, places, config["patch"]))

    seen: dict[str, tuple[Tensor, ...]] = {}
    tokens = module.get_submodule(f"vmkd.std.tokens_{len(places) - 1}")
    tokens.register_forward_hook(lambda _, inputs, output: seen.update(tokens=output))
    module.get_submodule("head").register_forward_hook(lambda _, inputs, output: seen.update(pooled=inputs))
    with torch.no_grad():
        evaluated, training = module.eval()(images), module.train()(images)
    spatial, channel = torch.stack(seen["tokens"], 1).split([config["dim"], _patches(weights)], 2)
    blocks = [value for name, value in training.items() if name.startswith("taps/")]
    return {
        **{f"out/block{index}_z": value for index, value in enumerate(blocks)},
        "out/train/logits": training["logits"],
        "out/train/dist_logits": torch.stack([training[f"std/{i}"] for i in range(config["n_teachers"])]),
        "out/z_pooled": seen["pooled"][0],
        "out/ts": spatial,
        "out/tc": channel.transpose(1, 2),
        "out/eval/logits": predicted(evaluated, "mean"),
    }


def _places(depth: int, intermediate: bool) -> list[int]:
    """The blocks beside which tokens stand: the last, and where it is asked for the one at two thirds."""
    return sorted({depth - 1} | ({int(depth * 2 / 3)} if intermediate else set()))


def _with_tokens(case: Case, places: list[int]) -> TracedModule:
    """The student with tokens, in float64; what each block leaves leaves it too."""
    size, config = case.arrays["in/x"].shape[1:], case.config
    student = MlpMixer(
        num_classes=config["num_classes"],
        img_size=config["img"],
        in_chans=size[0],
        patch_size=config["patch"],
        num_blocks=config["depth"],
        embed_dim=config["dim"],
        mlp_ratio=(config["f_spatial"], config["f_channel"]),
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    tokens = StdConfig(
        positions=tuple(places),
        spatial_ratio=config["f_spatial"],
        channel_ratio=config["f_channel"],
        variant="third_party",
        teachers=config["n_teachers"],
    )
    module = inject_std_tokens(vx.trace(student, input_size=tuple(size)), tokens)
    taps = TapConfig(tuple((str(index), index) for index in range(config["depth"])))
    return inject_feature_taps(module, taps).double()


def _patches(weights: Mapping[str, Tensor]) -> int:
    return weights["channel_dist_token"].shape[0]


def _renamed(weights: Mapping[str, Tensor], places: list[int], patch: int) -> dict[str, Tensor]:
    """Their weights under our keys. What blocks own without tokens beside them has no place here."""
    found = {}
    for key, value in weights.items():
        if key.endswith("_dist_token"):
            found[f"vmkd.std.tokens_0.{key.removesuffix('_dist_token')}"] = value
            continue
        path, _, kind = key.rpartition(".")
        if beside := _rename(path, BESIDE):
            index = int(path.split(".")[1])
            if index in places:
                found[f"vmkd.std.tokens_{places.index(index)}.blocks.0.{beside}.{kind}"] = _linear(value)
        elif path == "per_patch_fc" and kind == "weight":
            # Their patches are rows, columns, channels; a convolution has channels first.
            found["stem.proj.weight"] = value.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
        else:
            found[f"{_rename(path, NAMES)}.{kind}"] = _linear(value)
    return found


def _linear(value: Tensor) -> Tensor:
    """A convolution of one tap is a linear layer."""
    return value.squeeze(2) if value.ndim == 3 else value


def _rename(path: str, names: Mapping[str, str]) -> str:
    for pattern, name in names.items():
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
    return ""


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {"09a_std_mixer": replay_mixer}
