"""`strip`, `lower` and `ledger`: from the graph that trained to the graph that is deployed, each step proved
on its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vmkd_fx.errors import ModelError, UnknownNameError
from vmkd_fx.frames import Frames, parse_frames
from vmkd_fx.graph.edit import named_outputs
from vmkd_fx.graph.in_double import double_, floats, leave_double_
from vmkd_fx.graph.receipt import undo
from vmkd_fx.graph.shapes import multiply_adds, parameter_count
from vmkd_fx.graph.sizes import Sizes
from vmkd_fx.graph.trace import trace
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.graph.verify import TOLERANCE, check_equal, logits_of, outputs_of, probe_images
from vmkd_fx.passes.frames import feed, frames_for, normalised
from vmkd_fx.passes.lowering import chosen_passes
from vmkd_fx.passes.prediction import PREDICTIONS, keep_as_prediction, predicted, teacher_heads
from vmkd_fx.passes.proof import PROVED, Proof
from vmkd_fx.passes.rewrite import LoweringPass
from vmkd_fx.steps import Ledger, Step
from vmkd_fx.target import Target, parse_target


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
    passes: Sequence[str | LoweringPass] | None = None,
    predict: str = "class",
    keep_going: bool = False,
    autotune: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    frames: str | Frames | None = None,
) -> TracedModule:
    """Strip, merge, lower and verify; the result computes the same logits with less.

    Args:
        model: a task, a traced module or a plain model; it is left as it was.
        target: "torch", "onnxruntime", "tensorrt" or "tensorrt-rtx", with a list of compute capabilities
            where that applies.
        passes: names of `LOWERING` and passes of your own, in their order; all of `LOWERING` by default.
        predict: "class", "mean" or "dist", as for `strip`.
        keep_going: leave a site alone whose rewrite does not prove right, and say so in the ledger.
        autotune: measure how circulant mixers and global filters run fastest on this machine, in the target's
            runtime ("torch" or "onnxruntime"), where else a cost model chooses.
        evaluate: module to accuracy, on held-out images; the ledger then holds the accuracy of every
            prediction.
        frames: "uint8" or "uint8:nhwc", "uint8:nchw", or `Frames` with a mean and std of your own: the result
            takes bytes 0..255 in that layout and normalises them itself; else normalised (B, C, H, W).

    Returns:
        A graph with parameters of its own, in eval mode and the model's dtype; `ledger(result)` tells what
        happened.

    Raises:
        VerificationError: a pass changed the function by more than it may; names pass, site and error.
        PassError: the passes are in an order that cannot work, or one of them failed.
        UnknownNameError: there is no such target, pass or kind of frames.
        ModelError: the model takes other frames already, or frames and `evaluate` is given.
    """
    goal = parse_target(target)
    chosen = chosen_passes(passes, autotune)
    training = trace(model)
    given = None if frames is None else frames_for(training.info, parse_frames(frames))
    if evaluate is not None and training.info.frames is not None:
        raise ModelError(
            f"{training.info.name} takes frames {training.info.frames}, and evaluate= gives a model "
            "normalised images: evaluate it before it is lowered"
        )
    source = strip(training, predict, copy=True).eval()
    steps = [_measured(Step("training graph", training.info.name), training)]
    if training.receipts:
        steps.append(_measured(_check_strip(training, source, predict), source))
    lowered, passed = _lowered(source, goal, chosen, keep_going, given)
    accuracy = _accuracies(training, evaluate) if evaluate else {}
    lowered.meta["ledger"] = Ledger((*steps, *passed), accuracy)
    return lowered


def ledger(model: Any) -> Ledger:
    """What lowering did to this model, step by step; print it for a table."""
    return trace(model).ledger


def _lowered(
    source: TracedModule,
    target: Target,
    passes: Sequence[LoweringPass],
    keep_going: bool,
    frames: Frames | None,
) -> tuple[TracedModule, list[Step]]:
    """Run the passes in float64 on `source` and on a twin with random parameters, which proves each of
    them.
    """
    dtype, name = reference_tensor(source).dtype, source.info.name
    precisions = {path: tensor.dtype for path, tensor in floats(source, every_name=True)}
    source = double_(source)
    proof, idle = Proof.of(source)
    detail = f"ATen operators; {idle} nodes handed their input on"
    evaluated = Step("evaluation", detail, idle, error=proof.error, tolerance=TOLERANCE, checked=PROVED)
    steps = [_measured_operators(evaluated, proof.work)]
    expected = proof.work
    if frames is not None:
        steps.append(_measured_operators(feed(proof, frames, target), proof.work))
    images = probe_images(proof.work, batch=1)
    given = images if frames is None else normalised(images, frames)
    logits = logits_of(expected, given)
    for lowering_pass in passes:
        step, changed = proof.run(lowering_pass, target, keep_going)
        sizes = {key: getattr(steps[-1], key) for key in ("nodes", "parameters", "multiply_adds")}
        steps.append(_measured_operators(step, proof.work) if changed else replace(step, **sizes))
    work = proof.work
    error, bound = proof.hold(logits, logits_of(work, images), f"lowering {name}")
    leave_double_(work, dtype, precisions, f"lowering {name}")
    total = replace(
        steps[-1],
        name="lowered",
        detail="all passes, the model's own parameters",
        error=error,
        tolerance=bound,
        checked="float64",
        matched=None,
        sites=(),
        refused=(),
    )
    return work, [*steps, total]


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
    """The row with the sizes of a traced graph."""
    size = module.info.need_input_size()
    return _sized(step, module, multiply_adds(module, size))


def _measured_operators(step: Step, module: TracedModule) -> Step:
    """The row with the sizes of a graph of ATen operators, which are counted one by one."""
    sizes = Sizes(module, module.info.need_input_size())
    return _sized(step, module, sizes.multiply_adds(module.graph))


def _sized(step: Step, module: TracedModule, work: int) -> Step:
    nodes = sum(node.op.startswith("call_") for node in module.graph.nodes)
    return replace(step, nodes=nodes, parameters=parameter_count(module), multiply_adds=work)
