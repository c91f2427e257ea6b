"""Half precision and bfloat16 as a pass: float32 stays where the rules and the measured ranges say so.

    fp16    half everywhere but where a rule (`rules.py`), a range or a weight speaks against it
    bf16    the same with bfloat16, whose range is float32's, so that no range speaks against it
    mixed   fp16, and the sums of residual streams stay float32, and so do products that half disturbs

Input and output stay float32. The error is measured, not promised: half has 11 bits, so that 1e-3 is usual.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from vmkd_fx.deploy.precision.agreement import compared
from vmkd_fx.deploy.precision.asked import Asked
from vmkd_fx.deploy.precision.casts import Casts
from vmkd_fx.deploy.precision.plan import Limits, Plan, Planner
from vmkd_fx.deploy.precision.ranges import (
    BATCH,
    MARGIN_GUESSED,
    MARGIN_MEASURED,
    Reach,
    measure,
    random_images,
)
from vmkd_fx.deploy.precision.rules import NO_RULE, PRODUCT, operator_name, rule_of
from vmkd_fx.errors import ModelError, UnknownNameError, VerificationError
from vmkd_fx.graph.sizes import Sizes, forget
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.graph.values import evaluating, reference_tensor
from vmkd_fx.passes.evaluation import tidied
from vmkd_fx.passes.rewrite import argument, is_call, where
from vmkd_fx.steps import Refusal, Site, Step

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float16}

ASKED = "asked"
"""Key of a graph's meta under which the precision stands that it was asked to be in."""

Array = NDArray[np.float32]


def in_half(module: TracedModule, precision: str, images: Array | None = None) -> TracedModule:
    """The graph with its casts written down; its ledger has one step more.

    Args:
        module: lowered, in float32; left as it was.
        precision: "fp16", "bf16" or "mixed".
        images: normalised, (B, C, H, W); without any, ranges are guessed from random ones, with a wider
            margin.

    Raises:
        UnknownNameError: there is no such precision.
        ModelError: the graph is not in float32.
        VerificationError: the logits are no numbers any more.
    """
    if precision not in HALVES:
        raise UnknownNameError("half precision", precision, HALVES)
    dtype = HALVES[precision]
    if (found := reference_tensor(module).dtype) != torch.float32:
        raise ModelError(
            f"{module.info.name} is in {str(found).removeprefix('torch.')}: precision is lowered from float32"
        )
    guessed = images is None
    images = random_images(module) if images is None else images
    work = fork(module, to_edit=True, throwaway=True)
    _drop_idle_casts(work)
    streams = precision == "mixed"
    products = frozenset(n.name for n in work.graph.nodes if streams and rule_of(n).kind == PRODUCT)
    reach = measure(work, images, products, dtype)
    limits = Limits(dtype, MARGIN_GUESSED if guessed else MARGIN_MEASURED, streams)
    plan = Planner(work, reach, limits)()
    sites = tuple(Site(node.name, precision, where(node)) for node in work.graph.nodes if node in plan.half)
    refused = tuple(Refusal(node.name, reason) for node, reason in plan.single.items())
    kept = (n.name for n in plan.single if rule_of(n).kind == PRODUCT or rule_of(n) is NO_RULE)
    asked = Asked(precision, tuple(kept))
    casts = Casts(work, plan, dtype, _floating(work, reach))
    casts.write()
    for node in work.graph.nodes:
        forget(node)  # sizes and dtypes of before
    work.graph.lint()
    result = tidied(work)
    step = Step(precision, _told(plan, casts.made), len(sites), sites, refused)
    step = _compared(step, module, result, images, guessed)
    result.meta = {**result.meta, "ledger": module.ledger.add(step), ASKED: asked}
    return result


def _compared(step: Step, before: TracedModule, after: TracedModule, images: Array, guessed: bool) -> Step:
    """The step with its error and its agreement; sizes stay."""
    error, agreement = compared(logits(after, images), logits(before, images))
    if not np.isfinite(error):
        raise VerificationError(
            f"{before.info.name} in {step.name}: the logits are no longer finite on {len(images)} images; "
            "deploy it in bf16 or mixed, or in fp32"
        )
    sizes = replace(
        before.ledger.steps[-1] if before.ledger.steps else Step(""),
        name=step.name,
        detail=step.detail,
        matched=step.matched,
        sites=step.sites,
        refused=step.refused,
    )
    nodes = sum(node.op.startswith("call_") for node in after.graph.nodes)
    which = "random" if guessed else "calibration"
    return replace(
        sizes,
        nodes=nodes,
        error=error,
        tolerance=None,
        agreement=agreement,
        checked=f"against float32 on {len(images)} {which} images",
    )


def logits(module: TracedModule, images: Array) -> Array:
    """Of float32 images (B, C, H, W), in float32."""
    device = reference_tensor(module).device
    with evaluating(module), torch.no_grad():
        batches = [torch.from_numpy(images[i : i + BATCH]).to(device) for i in range(0, len(images), BATCH)]
        return np.concatenate([module(batch).float().cpu().numpy() for batch in batches])


def _drop_idle_casts(module: TracedModule) -> None:
    """A cast from float32 to float32 would keep its input from being anything else."""
    aten = torch.ops.aten
    sizes = Sizes(module, module.info.need_input_size())
    for node in list(module.graph.nodes):
        if not is_call(node, aten.to.dtype, aten._to_copy.default):
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        if argument(node, "dtype") == torch.float32 == sizes.held(source)[0].dtype:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


def _told(plan: Plan, casts: int) -> str:
    return f"{len(plan.half)} operators in half, {len(plan.single)} in float32, {casts} casts"


def _floating(module: TracedModule, reach: dict[str, Reach]) -> set[Node]:
    """The nodes that hold real numbers, and not lists of them."""
    return {
        node
        for node in module.graph.nodes
        if node.name in reach and reach[node.name].floating and not _hands_out_pieces(node)
    }


def _hands_out_pieces(node: Node) -> bool:
    return any(operator_name(user) == "getitem" for user in node.users)
