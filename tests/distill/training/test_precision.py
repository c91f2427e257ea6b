from __future__ import annotations

import pytest
import timm
import torch
from timm.task import ClassificationTask

import vmkd_fx as vx
from tests.models import images
from vmkd_fx.distill.data import Batch
from vmkd_fx.distill.recipe import TrainConfig
from vmkd_fx.distill.training.optimisation import make_optimizer
from vmkd_fx.distill.training.precision import Precision
from vmkd_fx.distill.training.step import Stepper
from vmkd_fx.distill.training.world import World
from vmkd_fx.models import register

CPU = torch.device("cpu")
MIXER = {"num_classes": 10, "num_blocks": 2, "embed_dim": 24}


def step_in(amp: str | None) -> tuple[dict[str, float], dict[str, torch.Tensor], Precision]:
    """Terms and gradients of one step of a distillation."""
    register()
    torch.manual_seed(0)
    student = timm.create_model("mixer_nano_32", **MIXER)
    torch.nn.init.normal_(student.head.weight, std=0.1)
    task = vx.wrap(student, "std", [timm.create_model("test_resnet", num_classes=10)]).train()
    config = TrainConfig(amp=amp)
    precision = Precision(amp, CPU)
    stepper = Stepper(task, make_optimizer(task.trainable_module, config), config, World(CPU), precision)
    found = stepper.gradients(Batch(images(8), torch.arange(8), torch.arange(8)), False)
    gradients = {name: p.grad.clone() for name, p in task.trainable_module.named_parameters()}
    assert all(p.dtype == torch.float32 for p in task.parameters())
    return found.terms, gradients, precision


@pytest.mark.parametrize(("amp", "error"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_gives_nearly_the_gradients_of_float32(amp: str, error: float) -> None:
    expected, gradients, _ = step_in(None)
    terms, found, precision = step_in(amp)
    assert terms == pytest.approx(expected, rel=error)
    assert terms != expected
    whole, other = (torch.cat([g.flatten() for g in side.values()]) for side in (gradients, found))
    # The factor of float16 is taken out again.
    assert 0 < float((whole - other).norm() / whole.norm()) < error
    assert precision.scales == (amp == "float16")


def test_an_overflow_in_float16_leaves_the_step_out_and_halves_the_factor() -> None:
    model = torch.nn.Linear(4, 2)
    task = ClassificationTask(torch.nn.Sequential(torch.nn.Flatten(), model), verbose=False)
    config = TrainConfig(amp="float16", optimizer="sgd")
    precision = Precision("float16", CPU)
    stepper = Stepper(task, make_optimizer(model, config), config, World(CPU), precision)
    before, factor = model.weight.detach().clone(), precision.scaler.get_scale()
    batch = Batch(torch.full((2, 4), 6e4), torch.tensor([0, 1]), torch.arange(2))
    found = stepper.gradients(batch, False)
    assert not torch.isfinite(torch.tensor(found.norm)) and found.terms["loss"] < float("inf")
    stepper.apply()
    assert torch.equal(model.weight, before)
    assert precision.scaler.get_scale() == factor / 2
    again = Precision("float16", CPU)
    again.load_state_dict(precision.state_dict())
    assert again.scaler.get_scale() == factor / 2
