"""The third-party form of STD's tokens, against a plain transcription."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vmkd_fx as vx
from tests.models import images, small
from tests.passes.test_std_families import student
from vmkd_fx.errors import MatchError
from vmkd_fx.passes.injections import Injected, edits_of, inject
from vmkd_fx.passes.std_tokens import StdConfig, inject_std_tokens

TEACHERS = 3


def two_layers(mlp: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    hidden = nn.functional.gelu(mlp.fc1.weight @ vector + mlp.fc1.bias)
    return mlp.fc2.weight[0] @ hidden + mlp.fc2.bias[0]


def test_one_update_for_all_teachers_flows_from_position_to_position() -> None:
    config = StdConfig((0, -1), variant="third_party", teachers=TEACHERS)
    module = inject_std_tokens(vx.trace(small("mixer")), config).double().eval()
    for parameter in module.get_submodule("vmkd").parameters():
        nn.init.normal_(parameter, std=0.5)
    tapped = vx.tap(module, {"0": 0, "1": 1})
    outputs = tapped(images(2, dtype=torch.float64))

    first, second = (module.get_submodule(f"vmkd.std.tokens_{place}") for place in (0, 1))
    assert second.spatial is None
    assert second.channel is None
    expected = []
    for image in (0, 1):
        spatial, channel = first.spatial, first.channel
        for place, tokens in enumerate((first, second)):
            z, block = outputs[f"taps/{place}"][image], tokens.blocks[0]
            patches = block.norm_spatial(torch.cat([z, spatial]))
            channels = block.norm_channel(torch.cat([z, channel], dim=1))
            step_s = torch.stack([two_layers(block.mlp_spatial, patches[:, j]) for j in range(24)])
            step_c = torch.stack([two_layers(block.mlp_channel, channels[i]) for i in range(16)])
            spatial = torch.stack([spatial[t] + step_s for t in range(TEACHERS)])
            channel = torch.stack([channel[:, t] + step_c for t in range(TEACHERS)], dim=1)
        expected.append(torch.stack([torch.cat([spatial[t], channel[:, t]]) for t in range(TEACHERS)]))
    for teacher in range(TEACHERS):
        head = module.get_submodule(f"vmkd.std.teacher_{teacher}.head")
        found = outputs[f"std/{teacher}"]
        torch.testing.assert_close(found, head(torch.stack(expected)[:, teacher]), rtol=1e-12, atol=1e-12)


def test_teachers_at_one_position_share_its_tokens() -> None:
    module = inject_std_tokens(vx.trace(small("mixer")), StdConfig((-1, -1), variant="third_party"))
    names = [name for name, _ in module.get_submodule("vmkd.std").named_children()]
    assert names == ["tokens_0", "teacher_0", "teacher_1"]


def test_its_gradient_of_the_information_is_not_corrected() -> None:
    config = StdConfig((-1, -1), variant="third_party", information=True)
    information = inject_std_tokens(vx.trace(small("mixer")), config).get_submodule("vmkd.std.information")
    assert information.loss.decay is None
    assert information.network.layers[0].in_features == 24 + 16


def test_tokens_cannot_flow_between_stages() -> None:
    model, _ = student("cycle_mlp_b1")
    with pytest.raises(MatchError, match=r"hands tokens on.*\(4, 32\), \(16, 24\).*variant='paper'"):
        inject_std_tokens(vx.trace(model), StdConfig((2, -1), variant="third_party"))


@pytest.mark.parametrize(
    "config",
    [
        StdConfig(("2/3", -1), information=True),
        StdConfig(tokens="channel", blocks=2),
        StdConfig((0, -1), variant="third_party", teachers=TEACHERS, information=True),
    ],
)
def test_a_student_is_built_again_from_its_receipt(config: StdConfig) -> None:
    module = inject_std_tokens(vx.trace(small("mixer")), config)
    edits = [Injected.from_json(edit.to_json()) for edit in edits_of(module)]
    again = inject(vx.trace(small("mixer")), edits)
    again.load_state_dict(module.state_dict())
    one, other = module.eval()(images()), again.eval()(images())
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
