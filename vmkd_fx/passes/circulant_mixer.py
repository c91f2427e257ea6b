"""Circulant channel-specific token mixing in the place of token-mixing MLPs (CCS).

    y[b, i, c] = sum over j of w[c % G, (j - i) mod N] x[b, j, c]            (CCS Eq. 5 to 7, Alg. 1)
               = FFT[IFFT(x) * FFT(w)]                                       (CCS Eq. 8)

Each group of channels has a circulant matrix of its own, given by one vector: G N weights for N tokens
instead of N^2 and more, and every token sees its neighbours by the same weights. One weight (G, N), without a
bias, replaces the whole token-mixing MLP: in Mixer both layers, in ResMLP the one, in gMLP the projection of
the spatial gating unit (ours: the paper has Mixer and ResMLP). The bias of what is replaced goes too.

`dense_circulant` is the transpose of W_3 in Eq. 5, for it multiplies from the left: row 0 of group g is w[g],
and each next row is moved by one to the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.fx import Node

from vmkd_fx.errors import MatchError, ModelError, RecipeError
from vmkd_fx.graph.anatomy import anatomy
from vmkd_fx.graph.edit import computes_as
from vmkd_fx.graph.parts import Anatomy, Block
from vmkd_fx.graph.replace import Replacement
from vmkd_fx.graph.shapes import Shape, node_shapes
from vmkd_fx.graph.traced import TracedModule, fork
from vmkd_fx.passes.mixers import (
    Blocks,
    Mixer,
    NoMixer,
    Stuck,
    body_of,
    find_mixers,
    linear_of,
    module_around,
    refuse_entangled,
    token_mlps,
    what_mixes,
)

NAME = "circulant"

_HAND_ON = (nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class CirculantConfig:
    """Settings of the replacement.

    Attributes:
        groups: G, circulant matrices a block; channel c uses the one of group c mod G.
        blocks: whose mixers are replaced: an index or a share of the depth each; None for all.
        initialise: "random", or "project" for the circulants nearest to the weights that are replaced, where
            one Linear is the whole mixer.
    """

    groups: int = 8
    blocks: Blocks = None
    initialise: str = "random"

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"circulant mixers need at least one group, got groups={self.groups}")
        if self.initialise not in ("random", "project"):
            raise RecipeError(f"initialise is 'random' or 'project', got {self.initialise!r}")
        if self.blocks is not None and not self.blocks:
            raise RecipeError("blocks=() names no block to replace mixers in; blocks=None takes all")


def channel_groups(channels: int, groups: int) -> torch.Tensor:
    """The group c mod G of each channel c: integers (C,)."""
    return torch.arange(channels) % groups


def circulant(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Mix tokens by circulant matrices (CCS Eq. 8): x (B, N, C) and w (G, N) to (B, N, C).

    Half precision is computed in float32; the result has the dtype of x.

    Raises:
        ModelError: w is for another number of tokens, or G does not divide C.
    """
    tokens, channels = x.shape[1], x.shape[2]
    groups = w.shape[0]
    if w.shape[1] != tokens or channels % groups:
        raise ModelError(
            f"circulant weights {tuple(w.shape)} do not fit x {tuple(x.shape)}: w is (G, N) and x (B, N, C), "
            "with G a divisor of C"
        )
    precision = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    kernel = torch.fft.rfft(w.to(precision), dim=1).conj().T.unsqueeze(1)  # (F, 1, G)
    spectrum = torch.fft.rfft(x.to(precision), dim=1)  # (B, F, C)
    mixed = (spectrum.unflatten(2, (channels // groups, groups)) * kernel).flatten(2)
    return torch.fft.irfft(mixed, n=tokens, dim=1).to(x.dtype)


def dense_circulant(w: torch.Tensor) -> torch.Tensor:
    """The matrices that w (G, N) stands for: D[g, i, j] = w[g, (j - i) mod N], (G, N, N)."""
    return w[:, _diagonals(w.shape[1]).to(w.device)]


def circulant_by_matrices(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What `circulant` computes, by N x N matrices: the reference for it."""
    matrices = dense_circulant(w)[channel_groups(x.shape[2], w.shape[0])]
    return torch.einsum("cij,bjc->bic", matrices, x)


def spectra(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of Eq. 8 as Alg. 1 computes them, IFFT(x) (B, N, C) and FFT(w) (G, N), both complex."""
    return torch.fft.ifft(x, dim=1), torch.fft.fft(w, dim=1)


def project(dense: torch.Tensor, groups: int) -> torch.Tensor:
    """The circulants nearest to matrices in Frobenius norm, as w (G, N): means along wrapped diagonals.

    Args:
        dense: one matrix (N, N) for all channels, or one a channel, (C, N, N); those of a group share a mean.
        groups: G. For C = G this is the inverse of `dense_circulant` on circulants.

    Raises:
        ModelError: the matrices are not square, or G does not divide C.
    """
    if dense.ndim not in (2, 3) or dense.shape[-1] != dense.shape[-2]:
        raise ModelError(f"expected square matrices (N, N) or (C, N, N) to project, got {tuple(dense.shape)}")
    if dense.ndim == 2:
        return project(dense.unsqueeze(0), 1).expand(groups, -1).clone()
    if dense.shape[0] % groups:
        raise ModelError(f"{dense.shape[0]} matrices cannot be shared out to {groups} groups evenly")
    mean = dense.unflatten(0, (-1, groups)).mean(0)
    places = _diagonals(dense.shape[-1]).to(dense.device).flatten()
    summed = mean.new_zeros(groups, dense.shape[-1]).index_add(1, places, mean.flatten(1))
    return summed / dense.shape[-1]


def _diagonals(tokens: int) -> torch.Tensor:
    """(j - i) mod N for each entry of a matrix (N, N)."""
    place = torch.arange(tokens)
    return (place[None, :] - place[:, None]) % tokens


class CirculantMixer(nn.Module):
    """CCS's token mixer: x (B, N, C) to (B, N, C) by one weight (G, N), without a bias.

    The weight starts as Alg. 1 takes it, as that of a Linear from N to G: uniform up to 1/sqrt(N).

    Raises:
        RecipeError: G does not divide C; names the divisors beside it.
    """

    stays_closed = True
    """For the tracer: one operation, whose realisation lowering chooses."""

    def __init__(
        self,
        tokens: int,
        channels: int,
        groups: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < groups <= channels or channels % groups:
            raise RecipeError(
                f"{groups} groups do not divide {channels} channels evenly; {_near(channels, groups)} would"
            )
        self.tokens, self.channels, self.groups = tokens, channels, groups
        self.weight = nn.Parameter(torch.empty(groups, tokens, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.tokens**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return circulant(x, self.weight)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, channels={self.channels}, groups={self.groups}"


def _near(channels: int, groups: int) -> str:
    """The divisors of `channels` beside `groups`, in words."""
    divisors = [number for number in range(1, channels + 1) if channels % number == 0]
    below = [number for number in divisors if number < groups][-1:]
    return " or ".join(str(number) for number in (*below, *[d for d in divisors if d > groups][:1]))


def inject_circulant_mixers(
    module: TracedModule, config: CirculantConfig, known: Anatomy | None = None
) -> TracedModule:
    """Replace token-mixing MLPs by `CirculantMixer`. `known` is the module's anatomy, where it is at hand.

    Found by what it does: between two exchanges of tokens and channels stand Linear layers, so they work over
    the tokens. The new module stands under the path of the old one, `blocks.0.mlp_tokens.weight` say. Biases
    that stood there are gone; a gMLP's starts at one and holds its gate open, a circulant gate starts small.

    Returns:
        A graph over the other parts of the same student. It is another function, and `strip` leaves it so.

    Raises:
        MatchError: the model has no such mixer, or one that cannot be replaced; says what each block has.
        RecipeError: G does not divide the channels; the weights of two layers were to be projected.
        ReceiptError: something was added to the graph before.
    """
    module = fork(module, to_edit=True)
    replacement = Replacement(module, NAME, asdict(config))
    known = known or anatomy(module)
    shapes = node_shapes(module)
    mixers = find_mixers(
        known,
        config.blocks,
        lambda block: _mixers_of(module, block, shapes),
        "circulant mixers replace what mixes tokens by Linear layers over them",
    )
    for mixer in mixers:
        circulant_mixer = _circulant_for(module, mixer, shapes[mixer.entry], config)
        replacement.put(mixer.path, circulant_mixer, mixer.entry, mixer.nodes[-1])
    return replacement.finish()


def _mixers_of(module: TracedModule, block: Block, shapes: Mapping[Node, Shape]) -> list[Mixer]:
    found = []
    nodes = {node.name: node for node in module.graph.nodes}
    for branch in block.branches:
        if branch.mixing.mixes is False or branch.layout != "NLC":
            continue
        length = shapes[nodes[branch.stream]][:2]
        for entry, piece in token_mlps(module, body_of(branch, nodes), shapes):
            if shapes[entry][:2] != length:
                continue
            if block.prefix_tokens:
                raise Stuck(f"its Linear over tokens mixes in prefix tokens ({block.prefix_tokens})")
            refuse_entangled(module, entry, piece)
            linear = next(str(node.target) for node in piece if linear_of(module, node))
            found.append(Mixer(module_around(module, piece, block.path) or linear, "NLC", entry, piece))
    if not found and any(branch.mixing.by == "linear over tokens" for branch in block.branches):
        raise Stuck(f"{what_mixes(block)}, and not by nn.Linear between two exchanges of tokens and channels")
    if not found:
        raise NoMixer(what_mixes(block))
    return found


def _circulant_for(
    module: TracedModule, mixer: Mixer, shape: Shape, config: CirculantConfig
) -> CirculantMixer:
    _, tokens, channels = shape
    linears = [layer for node in mixer.nodes if (layer := linear_of(module, node))]
    weight = linears[0].weight
    where = f"{mixer.path} of {module.info.name}"
    try:
        found = CirculantMixer(tokens, channels, config.groups, weight.device, weight.dtype)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if config.initialise == "project":
        steps = [_step(module, node) for node in mixer.nodes[1:-1]]
        steps = [step for step in steps if step]
        if len(steps) > 1 or not computes_as(linears[0], nn.Linear):
            raise MatchError(
                f"{where} cannot be projected onto a circulant: it is {', '.join(steps)}, which is no one "
                "matrix over the tokens; only one Linear alone is. Use initialise='random'"
            )
        with torch.no_grad():
            found.weight.copy_(project(weight.double(), config.groups))
    return found


def _step(module: TracedModule, node: Node) -> str:
    """What a node computes, in a word; "" where it hands its input on."""
    if node.op != "call_module":
        return "" if node.target == "contiguous" else getattr(node.target, "__name__", str(node.target))
    layer = module.get_submodule(str(node.target))
    return "" if isinstance(layer, _HAND_ON) else type(layer).__name__
