"""What an anatomy is made of: branches in blocks, blocks in stages, and how they are named and printed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from vmkd_fx.errors import MatchError
from vmkd_fx.graph.mixing import Mixing
from vmkd_fx.table import table


@dataclass(frozen=True)
class Branch:
    """One branch of a block: the work between a stream and the place where it joins it.

    Attributes:
        stream, end, add: names of the node it reads, its last node, and the sum.
        norm: name of the norm that it starts with, None without one.
        layout: of the tensor that enters it: "NLC", "NCHW" or "NHWC".
        body: names of the nodes behind the norm.
        mixing: whether the body mixes tokens, and by what.
        shortcut: what the work is added to: "identity", the stream; "projection", a layer of its own on the
            stream; "none", where the block is a chain or a concatenation and its work is taken as one branch.
        work: name of the last node before layer scale, drop path and dropout.
        channels: of the branch's end.
    """

    stream: str
    end: str
    add: str
    norm: str | None
    layout: str
    body: tuple[str, ...]
    mixing: Mixing
    shortcut: str = "identity"
    work: str = ""
    channels: int = 0


@dataclass(frozen=True)
class Block:
    """One block: a repeated module around residual branches.

    Attributes:
        path: module path.
        input, output: names of the nodes that enter and leave it.
        layout: "NLC", "NCHW" or "NHWC".
        channels, tokens: of the output, tokens without the prefix tokens.
        prefix_tokens: class, distillation and register tokens in front.
        branches: in graph order.
    """

    path: str
    input: str
    output: str
    layout: str
    channels: int
    tokens: int
    prefix_tokens: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks that leave equally many tokens.

    Attributes:
        path: of the module that holds these blocks and no others; of the last block where there is none.
        first, last: indices of its blocks.
        output: name of the node that leaves it.
        layout, channels, tokens: of that node, tokens without prefix tokens.
        prefix_tokens: in front of them.
    """

    path: str
    first: int
    last: int
    output: str
    layout: str
    channels: int
    tokens: int
    prefix_tokens: int


@dataclass(frozen=True)
class Anatomy:
    """What a model consists of.

    Attributes:
        model: its name.
        blocks: in order.
        stages: in order; together they hold all blocks.
        logits: name of the node that holds them.
        num_classes: their length; 0 for a model without a classifier.
        left_out: modules that resemble blocks and are not listed, and why.
        hidden: path of a closed module with parameters behind the last block, which may hold more blocks; ""
            where there is none.
        final: name of the node that holds the last features: the last block's output, normalised where a norm
            of the same shape stands behind it.
    """

    model: str
    blocks: tuple[Block, ...]
    stages: tuple[Stage, ...]
    logits: str
    num_classes: int
    left_out: tuple[tuple[str, str], ...] = ()
    hidden: str = ""
    final: str = ""

    def __str__(self) -> str:
        """Blocks as rows; neighbours that differ in their path alone share one."""
        stage_of = {i: number for number, s in enumerate(self.stages) for i in range(s.first, s.last + 1)}
        rows = []
        for facts, group in groupby(
            enumerate(self.blocks), key=lambda item: (stage_of[item[0]], *_facts(item[1]))
        ):
            (first, block), *rest = group
            last = rest[-1] if rest else None
            index = f"{first}-{last[0]}" if last else str(first)
            path = f"{block.path} to {last[1].path}" if last else block.path
            rows.append((facts[0], index, path, *facts[1:]))
        header = ("stage", "block", "module", "layout", "channels", "tokens", "prefix", "branches")
        title = (
            f"{self.model}: {len(self.blocks)} blocks in {len(self.stages)} stages, "
            f"{self.num_classes} classes from node {self.logits!r}"
        )
        return f"{title}\n{table(header, rows, right=(*header[:2], *header[4:7]))}" if rows else title

    def position(self, where: int | str) -> int:
        """The index of a block given as an index (-1 is the last) or as a fraction of the depth ("2/3").

        A fraction names the block after which that share of the depth is done: "2/3" of 12 blocks is block 7,
        the eighth.

        Raises:
            MatchError: the model has no blocks, or no such block, or the place counts from an end that the
                anatomy does not reach, for a module behind its last block is closed.
        """
        count = len(self.blocks)
        if not count:
            raise MatchError(
                f"{self.model} has no blocks with token features, so there is no block {where!r}"
            )
        try:
            if isinstance(where, str) and "/" in where:
                upper, lower = (int(part) for part in where.split("/"))
                index = max(upper * count // lower - 1, 0) if 0 < upper <= lower else count
            else:
                index = int(where)
        except (ValueError, ZeroDivisionError):
            index = count
        if not -count <= index < count:
            raise MatchError(
                f"{self.model} has no block {where!r}: it has {count}, so 0 to {count - 1}, -{count} to -1, "
                "or a fraction of the depth such as '2/3'"
            )
        if self.hidden and not str(where).isdigit():
            raise MatchError(
                f"{self.model}: place {where!r} counts from the end, and behind the last block found, "
                f"{self.blocks[-1].path}, {self.hidden} is closed and may hold more; "
                f"name a block by its index, 0 to {count - 1}"
            )
        return index % count


def _facts(block: Block) -> tuple[str, ...]:
    verdicts = {True: "mixes tokens ({})", False: "channels only", None: "unclear: {}"}
    marks = {"identity": "", "projection": ", projected shortcut", "none": ", no shortcut"}
    branches = "; ".join(
        verdicts[branch.mixing.mixes].format(branch.mixing.by)
        + ("" if branch.norm else ", no norm")
        + marks[branch.shortcut]
        for branch in block.branches
    )
    return block.layout, str(block.channels), str(block.tokens), str(block.prefix_tokens), branches
