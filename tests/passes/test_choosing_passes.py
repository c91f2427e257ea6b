"""Passes chosen, ordered, and one's own among them; what cannot be is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import FoldableNet, images
from vmkd_fx.errors import PassError, RecipeError, UnknownNameError
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.verify import randomise_
from vmkd_fx.passes.lowering import LOWERING, chosen_passes
from vmkd_fx.passes.named import named_passes
from vmkd_fx.passes.rewrite import LoweringPass, Rewrite

aten = torch.ops.aten


def tanh_by_sigmoid(rewrite: Rewrite) -> None:
    """tanh(x) = 2 sigmoid(2 x) - 1."""
    for node in rewrite.calls(aten.tanh):
        if rewrite.take(node, "a tanh as a sigmoid"):
            rewrite.replace(node, rewrite.inline(lambda x: 2 * torch.sigmoid(2 * x) - 1, node.args[0]))


OWN = LoweringPass(
    "tanh_by_sigmoid", tanh_by_sigmoid, {"channel_affine": "what it merges lies behind a tanh"}
)
MINE = """
from tests.passes.test_choosing_passes import OWN
OTHER = len
"""


@pytest.fixture
def model() -> TracedModule:
    return vx.trace(randomise_(FoldableNet()), input_size=(3, 32, 32))


def rows(lowered: nn.Module) -> list[str]:
    return [step.name for step in vx.ledger(lowered).steps]


def test_those_chosen_run_in_their_order(model: TracedModule) -> None:
    lowered = vx.lower(model, passes=["constants", "channel_affine", OWN])
    assert rows(lowered) == [
        *("training graph", "evaluation"),
        *("constants", "channel_affine", "tanh_by_sigmoid", "lowered"),
    ]
    step = vx.ledger(lowered).steps[-2]
    assert (step.matched, step.detail) == (1, "1 a tanh as a sigmoid")
    assert 0 < step.error < 1e-12
    assert not [node for node in lowered.graph.nodes if node.target is aten.tanh.default]
    torch.testing.assert_close(lowered(images()), model.eval()(images()))


def test_none_chosen(model: TracedModule) -> None:
    assert rows(vx.lower(model, passes=[])) == ["training graph", "evaluation", "lowered"]


def test_a_wrong_order_is_refused_with_its_reason(model: TracedModule) -> None:
    reason = "'channel_affine' has to follow 'constants', for it reads scales that views of parameters make"
    with pytest.raises(PassError, match=f"{reason}; asked for: channel_affine, constants"):
        vx.lower(model, passes=["channel_affine", "constants"])
    with pytest.raises(
        PassError, match="'tanh_by_sigmoid' has to follow 'channel_affine', for what it merges"
    ):
        vx.lower(model, passes=[OWN, "channel_affine"])


def test_what_has_to_go_before_may_be_left_out(model: TracedModule) -> None:
    assert rows(vx.lower(model, passes=["channel_affine"]))[2:-1] == ["channel_affine"]


def test_an_unknown_pass_lists_the_near_ones(model: TracedModule) -> None:
    with pytest.raises(UnknownNameError, match="no pass 'chanel_affine'; did you mean 'channel_affine'"):
        vx.lower(model, passes=["chanel_affine"])


@pytest.mark.parametrize("twice", [["constants", "constants"], [OWN, LoweringPass("tanh_by_sigmoid", print)]])
def test_twice_is_refused(model: TracedModule, twice: list) -> None:
    with pytest.raises(PassError, match="is asked for twice"):
        vx.lower(model, passes=twice)


def test_the_passes_of_lower_can_be_asked_for_by_name() -> None:
    names = [lowering_pass.name for lowering_pass in LOWERING]
    assert chosen_passes(names) == chosen_passes(None) == LOWERING
    assert {earlier for one in LOWERING for earlier in one.after} <= set(names)


def test_names_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_the_user.py").write_text(MINE)
    assert named_passes(None) == LOWERING
    assert named_passes("") == ()
    assert [one.name for one in named_passes("constants, channel_affine")] == ["constants", "channel_affine"]
    assert named_passes("constants,mine_of_the_user:OWN")[1] is OWN
    with pytest.raises(PassError, match=r"mine_of_the_user:OTHER is of type builtin.* and no pass"):
        named_passes("mine_of_the_user:OTHER")
    with pytest.raises(
        UnknownNameError, match="mine_of_the_user: there is no pass 'OWM'; did you mean 'OWN'"
    ):
        named_passes("mine_of_the_user:OWM")
    with pytest.raises(RecipeError, match="there is no module 'nowhere'"):
        named_passes("nowhere:OWN")
    with pytest.raises(RecipeError, match=r"no name of a pass: write package\.module:name"):
        named_passes("mine_of_the_user:")
