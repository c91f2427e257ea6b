"""Rows of a cache: what goes in comes back, as exactly as the form promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vmkd_fx.distill.cache.form import CLASSES, Feature, Form
from vmkd_fx.distill.losses import SoftDistillation
from vmkd_fx.distill.methods import Wanted
from vmkd_fx.errors import CacheError, RecipeError, UnknownNameError

CPU = torch.device("cpu")


def logits(count: int = 64, classes: int = 1000, spread: float = 3.0, seed: int = 0) -> Tensor:
    """Logits with the long tail of a trained classifier."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator) * spread + 5


def there_and_back(form: Form, given: Tensor) -> Tensor:
    columns = form.encode({"logits": given})
    expected = {name: (kind, shape) for name, (kind, shape) in form.columns.items() if name in columns}
    assert {name: (rows.dtype.name, rows.shape[1:]) for name, rows in columns.items()} == expected
    return form.decode(columns, CPU, torch.float32)["logits"]


def test_whole_logits_in_float32_come_back_bit_for_bit() -> None:
    given = logits()
    assert torch.equal(there_and_back(Form(1000, None, "float32"), given), given)


def test_in_float16_a_log_probability_is_off_by_its_own_rounding() -> None:
    given = logits()
    back = there_and_back(Form(1000, None, "float16"), given)
    log_p = given.double().log_softmax(-1)
    # Half a unit in the last of eleven bits; beneath 2^-14 numbers are evenly spaced.
    bound = log_p.abs() * 2**-11 + 2**-25
    assert ((back.double() - given.double()).abs() <= bound + 1e-6).all()


def test_of_top_k_the_rest_is_spread_evenly() -> None:
    given = logits()
    back = there_and_back(Form(1000, 100, "float32"), given)
    p, q = given.double().softmax(-1), back.double().softmax(-1)
    top = p.topk(100).indices
    torch.testing.assert_close(q.gather(-1, top), p.gather(-1, top), rtol=1e-5, atol=0)
    others = torch.ones_like(p, dtype=torch.bool).scatter_(-1, top, False)
    mean = (1 - p.gather(-1, top).sum(-1)) / 900
    torch.testing.assert_close(q[others].view(64, 900), mean[:, None].expand(64, 900), rtol=1e-4, atol=0)
    # The logits themselves come back, not only their softmax.
    torch.testing.assert_close(back.gather(-1, top), given.gather(-1, top), rtol=0, atol=1e-5)


def test_the_loss_with_more_classes_comes_nearer() -> None:
    given, student = logits(), logits(seed=1, spread=1.0)
    loss = SoftDistillation(1.0)
    exact = loss(student, given).mean()
    errors = [
        abs(float(loss(student, there_and_back(Form(1000, k, "float16"), given)).mean() / exact) - 1)
        for k in (10, 100, 500)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_sure_teacher_keeps_its_order_and_no_nan() -> None:
    given = torch.zeros(2, 50)
    given[0, 7], given[1, 3] = 3000.0, -3000.0
    for top_k in (None, 5):
        back = there_and_back(Form(50, top_k, "float16"), given)
        assert back.isfinite().all()
        assert back[0].argmax() == 7
    assert SoftDistillation(1.0)(torch.zeros(2, 50), back).isfinite().all()


def test_classes_above_65536_have_wider_numbers() -> None:
    given = logits(2, 70000)
    form = Form(70000, 3)
    columns = form.encode({"logits": given})
    assert columns[CLASSES].dtype == np.uint32
    np.testing.assert_array_equal(columns[CLASSES], given.topk(3).indices.numpy())


def test_features_come_back_as_they_were_read() -> None:
    wanted = Wanted("block 1 norm 0", "NLC", 1, (4, 4), (2, 2))
    form = Form(10, None, "float32", {"vitkd/x": Feature(wanted, (4, 6))})
    feature = torch.randn(3, 4, 6)
    columns = form.encode({"logits": logits(3, 10), "vitkd/x": feature})
    assert torch.equal(form.decode(columns, CPU, torch.float32)["vitkd/x"], feature)
    assert Form.from_json(form.to_json()) == form
    assert form.bytes_per_image == 4 + 4 + 10 * 4 + 4 * 6 * 4


def test_bytes_of_the_top_hundred() -> None:
    # Sample, sketch, rest and offset in 4 bytes each, and 2 + 2 bytes a class.
    assert Form(1000, 100).bytes_per_image == 4 * 4 + 100 * 4
    assert Form(1000).bytes_per_image == 3 * 4 + 1000 * 2


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="cache: there is no dtype 'bfloat16'"):
        Form(10, None, "bfloat16")
    for top_k in (0, 10, 11):
        with pytest.raises(RecipeError, match=f"top_k is {top_k} and the teacher knows 10 classes"):
            Form(10, top_k)
    with pytest.raises(CacheError, match="logits hold values that are not finite"):
        Form(3).encode({"logits": torch.tensor([[0.0, math.nan, 1.0]])})
