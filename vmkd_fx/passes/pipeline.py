"""`strip`, `lower` and `ledger`: from the graph that trained to the graph that is deployed, each step proved
on its result.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vmkd_fx.errors import UnknownNameError, VerificationError
from vmkd_fx.graph.edit import named_outputs
from vmkd_fx.graph.receipt import undo
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.graph.verify import TOLERANCE, check_equal, logits_of, outputs_of, probe_images, randomise_
from vmkd_fx.passes.circulant_lowering import realise_circulants
from vmkd_fx.passes.evaluation import specialise_to_evaluation
from vmkd_fx.passes.fold.channel_affine import fold_channel_affines
from vmkd_fx.passes.prediction import PREDICTIONS, keep_as_prediction, predicted, teacher_heads
from vmkd_fx.passes.record import LoweringPass, Record
from vmkd_fx.steps import Ledger, Step
from vmkd_fx.target import parse_target

LOWERING: tuple[tuple[str, LoweringPass], ...] = (
    ("evaluation", specialise_to_evaluation),
    ("channel_affine", fold_channel_affines),
    ("circulant", realise_circulants),
)
"""The passes of `lower`, in their order."""


def strip(model: Any, predict: str = "class", *, copy: bool = False) -> TracedModule:
    """Take out what training added.

    Args:
        model: a task, a traced module or a plain model.
        predict: what the result returns (STD table 6): "class", the student's own head, and then its state
            dict is the plain student's; "dist", the mean of the distillation heads; "mean", the average of
            the two.
        copy: give the result parameters of its own.

    Raises:
        ReceiptError: the graph no longer agrees with the receipts of its passes.
        MatchError: there are no distillation heads to predict from.
    """
    if predict not in PREDICTIONS:
        raise UnknownNameError("prediction", predict, PREDICTIONS)
    module = trace(model, copy=copy)
    if predict != "class":
        return keep_as_prediction(module, predict)
    if module.receipts:
        while module.receipts:
            undo(module)
        module.recompile()
    return module


def lower(
    model: Any,
    target: str = "onnxruntime",
    *,
    predict: str = "class",
    evaluate: Callable[[nn.Module], float] | None = None,
) -> TracedModule:
    """Strip, merge, lower and verify; the result computes the same logits with less.

    Args:
        model: a task, a traced module or a plain model; it is left as it was.
        target: "torch", "onnxruntime", "tensorrt" or "tensorrt-rtx", with a list of compute capabilities
            where that applies.
        predict: "class", "mean" or "dist", as for `strip`.
        evaluate: module to accuracy, on held-out images; the ledger then holds the accuracy of every
            prediction.

    Returns:
        A graph with parameters of its own, in eval mode and the model's dtype; `ledger(result)` tells what
        happened.

    Raises:
        VerificationError: a pass changed the function by more than it may.
    """
    parse_target(target)
    training = trace(model)
    source = strip(training, predict, copy=True).eval()
    steps = [_measured(Step("training graph", training.info.name), training)]
    if training.receipts:
        steps.append(_measured(_check_strip(training, source, predict), source))
    lowered, passed = _run_passes(source)
    accuracy = _accuracies(training, evaluate) if evaluate else {}
    lowered.meta["ledger"] = Ledger((*steps, *passed), accuracy)
    return lowered


def ledger(model: Any) -> Ledger:
    """What lowering did to this model, step by step; print it for a table."""
    return trace(model).ledger


def _run_passes(source: TracedModule) -> tuple[TracedModule, list[Step]]:
    """Run the pipeline in float64 on `source`, in place, and on a twin with random parameters.

    The twin proves each pass, on two images so that nothing mixes samples unseen; `source` proves the whole.
    """
    dtype = reference_tensor(source).dtype
    precisions = {name: tensor.dtype for name, tensor in _floats(source)}
    work = source.double()
    twin = randomise_(deepcopy(work))
    images = probe_images(work)
    expected, twin_before = logits_of(work, images[:1]), logits_of(twin, images)
    steps: list[Step] = []
    for name, lowering_pass in LOWERING:
        code = work.code
        work, record = lowering_pass(work)
        twin, _ = lowering_pass(twin)
        if not record.matched and work.code == code:
            last = steps[-1] if steps else _measured(Step(name), work)
            steps.append(replace(last, name=name, **_outcome(record, None)))
            continue
        twin_after = logits_of(twin, images)
        error = check_equal(twin_before, twin_after, TOLERANCE, f"pass {name} on {source.info.name}")
        twin_before = twin_after
        steps.append(_measured(Step(name, **_outcome(record, error)), work))
    found = logits_of(work, images[:1])
    total: dict[str, Any] = {
        "detail": "all passes, the model's own parameters",
        "error": check_equal(expected, found, TOLERANCE, f"lowering {source.info.name}"),
        "tolerance": TOLERANCE,
        "checked": "float64",
        "matched": None,
        "refused": (),
    }
    for name, tensor in _floats(work):
        was_finite = torch.isfinite(tensor)  # a mask may hold infinities of its own
        tensor.data = tensor.to(precisions.get(name, dtype))
        if not torch.equal(torch.isfinite(tensor), was_finite):
            raise VerificationError(f"lowering {source.info.name}: {name} does not fit into {tensor.dtype}")
    return work, [*steps, replace(steps[-1], name="lowered", **total)]


def _floats(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that hold real numbers, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _outcome(record: Record, error: float | None) -> dict[str, Any]:
    """The fields of a pass's row that its record and its proof fill."""
    proved = error is not None
    return {
        "detail": record.detail,
        "matched": record.matched,
        "refused": record.refused,
        "error": error,
        "tolerance": TOLERANCE if proved else None,
        "checked": "float64, randomised parameters" if proved else "unchanged",
    }


def _check_strip(training: TracedModule, stripped: TracedModule, predict: str) -> Step:
    """Stripping is exact: bit for bit for the class head, and up to rounding for an average of heads."""
    images = probe_images(training, batch=1)
    expected = predicted(outputs_of(training, images), predict)
    tolerance = 0.0 if predict == "class" else 1e-6
    error = check_equal(expected, logits_of(stripped, images), tolerance, f"stripping {training.info.name}")
    taken = ", ".join(receipt.name for receipt in training.receipts)
    kept = "" if predict == "class" else f", kept as the prediction {predict!r}"
    return Step(
        "strip", f"{taken}{kept}", len(training.receipts), error=error, tolerance=tolerance, checked="float32"
    )


def _accuracies(training: TracedModule, evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    predictions = PREDICTIONS if teacher_heads(named_outputs(training)) else PREDICTIONS[:1]
    return {predict: float(evaluate(strip(training, predict).eval())) for predict in predictions}


def _measured(step: Step, module: TracedModule) -> Step:
    size = module.info.need_input_size()
    nodes = len(module.graph.nodes)
    return replace(
        step, nodes=nodes, parameters=parameter_count(module), multiply_adds=multiply_adds(module, size)
    )
