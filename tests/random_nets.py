"""The strategy that draws random residual networks: convolutions, tokens, norms, branches, and traps."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from tests.random_branches import BRANCHES
from tests.random_kinds import KINDS, OUT, SEVERAL
from tests.random_specs import HEADS, VALUES, Net, Step

_SEVERAL = st.lists(st.sampled_from(BRANCHES), min_size=2, max_size=4).map(tuple)


def _step(name: str, inside: st.SearchStrategy[tuple[Step, ...]] | None = None) -> st.SearchStrategy[Step]:
    kind = KINDS[name]
    choices = {
        key: _SEVERAL if among is SEVERAL else st.sampled_from(among) for key, among in kind.options.items()
    }
    least, most = kind.branches
    branches = (
        st.lists(inside, min_size=least, max_size=most).map(tuple) if inside is not None else st.just(())
    )
    reuse = st.sampled_from(("", "", "", "", "", "share", "tie"))
    options = st.fixed_dictionaries(choices).map(lambda drawn: tuple(drawn.items()))
    return st.builds(Step, st.just(name), options, branches, reuse)


_LEAVES = {name: _step(name) for name, kind in KINDS.items() if not kind.branches[1]}
_LAYER = st.one_of(*(_LEAVES[name] for name in ("conv", "linear", "token linear", "transposed", "attention")))
_NORM = st.one_of(*(_LEAVES[name] for name in ("batch norm", "layer norm", "group norm", "rms norm")))
_AFFINE = st.one_of(_LEAVES["constant"], _LEAVES["affine"], _LEAVES["batch norm"])
_LEAF = st.one_of(*_LEAVES.values())
_MOTIF = st.one_of(
    _LEAF.map(lambda step: (step,)),
    st.tuples(_LAYER, _AFFINE),
    st.tuples(_LEAVES["conv"], _LEAVES["batch norm"], _LEAVES["act"]),
    st.tuples(_AFFINE, _LAYER),
    st.tuples(_NORM, _AFFINE, _LAYER),
    st.tuples(_LEAVES["conv"], _LEAVES["conv"]),
    st.tuples(_LEAVES["linear"], _LEAVES["linear"]),
    st.tuples(_LEAVES["parallel"], _LEAVES["act"]),
)


def _stretch(
    motifs: st.SearchStrategy[tuple[Step, ...]], least: int, most: int
) -> st.SearchStrategy[tuple[Step, ...]]:
    return st.lists(motifs, min_size=least, max_size=most).map(lambda drawn: sum(drawn, ()))


def _with_trees(inside: st.SearchStrategy[tuple[Step, ...]]) -> st.SearchStrategy[tuple[Step, ...]]:
    trees = [
        _step(name, inside).map(lambda step: (step,)) for name, kind in KINDS.items() if kind.branches[1]
    ]
    return st.one_of(_MOTIF, *trees)


_FLAT = _stretch(_MOTIF, 0, 3)
_NESTED = _stretch(_with_trees(_FLAT), 0, 3)
_STEPS = _stretch(_with_trees(_NESTED), 1, 6)
_STEM = st.builds(
    lambda width, patch, bias: (
        Step(
            "conv",
            (("out", width), ("kernel", patch), ("stride", patch), ("padding", "valid"), ("bias", bias)),
        ),
    ),
    st.sampled_from(OUT),
    st.sampled_from((2, 3, 1)),
    st.booleans(),
)


_NET = st.builds(
    Net,
    size=st.tuples(st.integers(16, 24), st.integers(16, 24)),
    steps=st.tuples(st.one_of(_STEM, st.just(())), _STEPS).map(lambda parts: parts[0] + parts[1]),
    head=st.sampled_from(HEADS),
    tap=st.one_of(st.none(), st.none(), st.integers(0, 4)),
    values=st.sampled_from(("random", "random", *VALUES)),
    dtype=st.sampled_from((torch.float64,) * 6 + (torch.float32, torch.bfloat16)),
    channels_last=st.sampled_from((False, False, True)),
    target=st.sampled_from(("torch", "onnxruntime", "tensorrt-rtx")),
    seed=st.integers(0, 3),
)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Networks with images of 16 to 24 pixels a side, and a target to lower each for."""
    return replace(draw(_NET))  # a copy prints as a network, the drawn one as what drew it
