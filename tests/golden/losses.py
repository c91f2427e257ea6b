"""Losses (cases 01, 02, 03, 03b, 05b, 09b, 09c): names and shapes are the authors', the arithmetic ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.case import Case
from tests.golden.fill import filled
from vmkd_fx.distill.losses import (
    DKD,
    WSLD,
    CiTLoss,
    DeiTLoss,
    HardDistillation,
    MGDLoss,
    MutualInformationLoss,
    SoftDistillation,
    SRRLLoss,
    TeacherLoss,
    USKDLoss,
    ViTKDLoss,
    class_and_distillation,
    confidence_weights,
    entropy,
    mutual_information,
    nkd_parts,
)
from vmkd_fx.passes.heads import (
    MGDGenerator,
    StatisticsNetwork,
    ViTKDGenerator,
    ViTKDMimic,
    WeakClassifier,
    kept_tokens,
    token_mask,
)


def leaf(value: Tensor) -> Tensor:
    """An input that takes a gradient."""
    return value.clone().requires_grad_()


def gradients(loss: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d loss / d each tensor, under its name; zero where the loss does not see it."""
    return dict(
        zip(
            wanted,
            torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )


def recorded(case: Case, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds of what was found; files leave out large gradients."""
    return {name: value.detach() for name, value in found.items() if name in case.results}


def replay_vitkd(case: Case) -> dict[str, Tensor]:
    config, a = case.config, case.arrays
    low, high = leaf(a["in/low_s"]), leaf(a["in/high_s"])
    tokens, ratio = a["in/noise"].shape[1], config["lambda"]
    widths = low.shape[-1], a["in/low_t"].shape[-1]
    generator = ViTKDGenerator("conv", *widths, tokens, ratio)
    mimics = nn.ModuleList(ViTKDMimic(*widths) for _ in range(low.shape[1]))
    modules = nn.ModuleDict({"generator": generator, "mimics": mimics}).double()
    names = {name: _vitkd_key(name) for name, _ in modules.named_parameters()}
    modules.load_state_dict({name: a[f"sd/{key}"] for name, key in names.items()})

    drawn = token_mask(a["in/noise"], kept_tokens(tokens, ratio))
    generated, mask = generator(high, drawn.mask)
    mimicked = [mimic(low[:, i]) for i, mimic in enumerate(mimics)]
    loss = ViTKDLoss(config["alpha"], config["beta"], ratio)
    parts = loss(mimicked, list(a["in/low_t"].unbind(1)), generated, mask, a["in/high_t"])
    total = parts.mimicking + parts.generation
    wanted = {"grad/low_s": low, "grad/high_s": high}
    wanted |= {f"grad/sd/{names[name]}": value for name, value in modules.named_parameters()}
    found = {
        "out/loss": total,
        "out/loss_lr": parts.mimicking,
        "out/loss_gen": parts.generation,
        "out/mask": mask,
        "out/ids_restore": drawn.restore,
        "out/ids_masked": drawn.masked,
        "out/len_keep": torch.tensor(generator.kept),
    }
    return recorded(case, {**found, **gradients(total, wanted)})


def _vitkd_key(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "mimics":
        return f"align2.{rest.replace('.align', '')}"
    return rest.replace(".conv1.", ".0.").replace(".conv2.", ".2.")


def replay_nkd(case: Case) -> dict[str, Tensor]:
    a, found = case.arrays, {}
    for temperature in case.config["temps"]:
        student = leaf(a["in/logit_s"])
        parts = nkd_parts(student, a["in/logit_t"], a["in/gt_label"], case.config["gamma"], temperature)
        target, rest = parts.target.mean(), parts.non_target.mean()
        name = f"temp{temperature:g}"
        found |= {f"{name}/loss": target + rest, f"{name}/loss_target": target}
        found |= {f"{name}/loss_nontarget": rest}
        found |= gradients(target + rest, {f"{name}/grad_logit_s": student})
    return recorded(case, found)


def replay_deit(case: Case) -> dict[str, Tensor]:
    config, a, found = case.config, case.arrays, {}
    for kind in ("none", "soft", "hard"):
        logits, dist = leaf(a["in/outputs"]), leaf(a["in/outputs_kd"])
        criterion = _criterion(config["base"], config)
        loss = DeiTLoss(kind, config["alpha"], config["tau"], criterion, variant="code")
        value = loss(logits, dist, a["in/teacher_logits"], a["in/labels"])
        found[f"{kind}/loss"] = value
        found |= gradients(value, {f"{kind}/grad_outputs": logits, f"{kind}/grad_outputs_kd": dist})
    return recorded(case, found)


def _criterion(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The loss to the labels by the authors' name for it; PyTorch's takes soft labels too."""
    if name in ("ce", "soft_target_ce"):
        return nn.CrossEntropyLoss()
    if name == "label_smoothing":
        return nn.CrossEntropyLoss(label_smoothing=config["smoothing"])
    raise KeyError(f"no loss to the labels is called {name!r}")


def replay_other_kd(case: Case) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in (_logit_losses, _mgd, _srrl, _uskd):
        found |= part(case.config, case.arrays)
    return recorded(case, found)


def _logit_losses(config: Mapping[str, Any], a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    temperature, share = config["kd"]
    dkd_temperature, alpha, beta = config["dkd"]
    losses: dict[str, tuple[nn.Module, float]] = {
        "kd": (SoftDistillation(temperature, keep_entropy=True), share),
        "dkd": (DKD(alpha, beta, dkd_temperature), 1.0),
        "wsld": (WSLD(*config["wsld"]), 1.0),
    }
    found: dict[str, Tensor] = {}
    for name, (loss, weight) in losses.items():
        student = leaf(a["in/logit_s"])
        value = weight * loss(student, a["in/logit_t"], a["in/gt_label"]).mean()
        found |= {f"{name}/loss": value, **gradients(value, {f"{name}/grad_logit_s": student})}
    return found


def _mgd(config: Mapping[str, Any], a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    alpha, ratio = config["mgd"]
    student = leaf(a["in/fea_s"])
    generator = MGDGenerator(student.shape[1], a["in/fea_t"].shape[1], ratio).double()
    generator.load_state_dict({name: a[f"sd/mgd.{name}"] for name in generator.state_dict()})
    value = MGDLoss(alpha)(generator(student, a["in/mgd_noise"]), a["in/fea_t"])
    return {"mgd/loss": value, **gradients(value, {"mgd/grad_fea_s": student})}


def _srrl(config: Mapping[str, Any], a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    feature, regressed = leaf(a["in/fea_s_aligned"]), leaf(a["in/logit_st"])
    value = sum(SRRLLoss(*config["srrl"])(feature, a["in/fea_t"], regressed, a["in/logit_t"]))
    wanted = {"srrl/grad_fea_s_aligned": feature, "srrl/grad_logit_st": regressed}
    return {"srrl/loss": value, **gradients(value, wanted)}


def _uskd(config: Mapping[str, Any], a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind, labels in (("uskd_hard", a["in/gt_label"]), ("uskd_soft", a["in/gt_soft"])):
        student, middle = leaf(a["in/logit_s"]), leaf(a["in/fea_mid"])
        weak = WeakClassifier(middle.shape[1], student.shape[1]).double()
        weak.load_state_dict({name: a[f"sd/uskd.{name}"] for name in weak.state_dict()})
        value = sum(USKDLoss(*config["uskd"])(student, weak(middle), labels))
        wanted = {f"{kind}/grad_logit_s": student, f"{kind}/grad_fea_mid": middle}
        found |= {f"{kind}/loss": value, **gradients(value, wanted)}
    return found


def replay_coadvise(case: Case) -> dict[str, Tensor]:
    a = case.arrays
    heads = [leaf(a[f"in/{name}"]) for name in ("y_cls", "y_kd_conv", "y_kd_inv")]
    loss = CiTLoss(temperatures=(case.config["T"],) * 2)
    parts = loss(*heads, a["in/t_conv"], a["in/t_inv"], a["in/targets"])
    total = sum(parts)
    found = {
        "out/loss": total,
        "out/ce": parts.class_loss,
        "out/kd_conv": parts.conv,
        "out/kd_inv": parts.inv,
    }
    names = ("grad/y_cls", "grad/y_kd_conv", "grad/y_kd_inv")
    return recorded(case, {**found, **gradients(total, dict(zip(names, heads, strict=True)))})


def replay_mine(case: Case) -> dict[str, Tensor]:
    a = case.arrays
    spatial, channel = leaf(a["in/ts"]), leaf(a["in/tc"])
    network = _statistics_network(case, reversal=None)
    joint, marginal = network(_tokens(spatial, channel))
    value = mutual_information(joint, marginal)
    weights = {f"grad/net/{_net_key(name)}": p for name, p in network.named_parameters()}
    found = {"out/V": value, "out/psi_joint": joint[:, None], "out/psi_marginal": marginal[:, None]}
    found |= gradients(value, {"grad/ts": spatial, "grad/tc": channel, **weights})
    return recorded(case, {**found, **_mine_step(case)})


def _mine_step(case: Case) -> dict[str, Tensor]:
    """One backward pass through the gradient reversal, one step of SGD for network and tokens alike."""
    spatial, channel = leaf(case.arrays["in/ts"]), leaf(case.arrays["in/tc"])
    network = _statistics_network(case, reversal=1.0)
    optimizer = torch.optim.SGD([spatial, channel, *network.parameters()], lr=case.config.get("lr", 0.01))
    MutualInformationLoss(decay=None)(*network(_tokens(spatial, channel))).backward()
    optimizer.step()
    after = {f"out/net_after_step/{_net_key(name)}": p for name, p in network.named_parameters()}
    return {"out/ts_after_step": spatial, "out/tc_after_step": channel, **after}


def _statistics_network(case: Case, reversal: float | None) -> StatisticsNetwork:
    weights = filled(case.meta) if "fill" in case.meta else case.state()
    _, teachers, spatial = case.arrays["in/ts"].shape
    sizes = [(spatial, case.arrays["in/tc"].shape[1])] * teachers
    hidden = len(weights["0.bias"])
    network = StatisticsNetwork(sizes, hidden, variant="third_party", reversal=reversal).double()
    network.load_state_dict({name: weights[_net_key(name)] for name in network.state_dict()})
    return network


def _tokens(spatial: Tensor, channel: Tensor) -> list[Tensor]:
    """(B, T, D) and (B, N, T) as one (B, D + N) a teacher."""
    return [torch.cat(pair, 1) for pair in zip(spatial.unbind(1), channel.unbind(2), strict=True)]


def _net_key(name: str) -> str:
    return name.removeprefix("layers.")


READINGS = {
    "paper/per_sample": ("entropy", "paper"),
    "paper/batch_mean": ("entropy", "batch_mean"),
    "paper/per_sample_negS": ("negative_entropy", "paper"),
    "thirdparty/hard": ("entropy", "third_party"),
}


def replay_std_loss(case: Case) -> dict[str, Tensor]:
    a, teachers = case.arrays, case.arrays["in/teacher_logits"]
    found = {"paper/S": entropy(teachers)}
    found["thirdparty/teacher_weights"] = confidence_weights(teachers, "entropy", "third_party")[:, 0]
    logits = leaf(a["in/outputs"])
    class_loss = F.cross_entropy(logits, a["in/labels"])
    found |= {"thirdparty/none/loss": class_loss}
    found |= gradients(class_loss, {"thirdparty/none/grad_outputs": logits})
    for name, (confidence, variant) in READINGS.items():
        logits, heads = leaf(a["in/outputs"]), leaf(a["in/dist_outputs"])
        dist = TeacherLoss(HardDistillation(), confidence, variant)(heads, teachers).sum()
        class_loss = F.cross_entropy(logits, a["in/labels"])
        loss = class_and_distillation(class_loss, dist, case.config["alpha"])
        found[f"{name}/weights"] = confidence_weights(teachers, confidence, variant)
        found |= {f"{name}/loss_dist": dist, f"{name}/loss": loss}
        found |= gradients(loss, {f"{name}/grad_outputs": logits, f"{name}/grad_dist_outputs": heads})
    return recorded(case, found)


CASES: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "01_vitkd": replay_vitkd,
    "02_nkd": replay_nkd,
    "03_deit": replay_deit,
    "03b_other_kd": replay_other_kd,
    "05b_coadvise_loss": replay_coadvise,
    "09b_mine": replay_mine,
    "09c_std_loss": replay_std_loss,
}
