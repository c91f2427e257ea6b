"""Which operators compute with channels first, as a minimum cut.

Every operator is on one of two sides, first or last. A value is turned once if anybody reads it on the other
side than it is made on, whoever else does; that is two arcs by way of a node of its own:

    maker -> w -> a -> oo -> every reader          every reader -> oo -> b -> w -> maker

cut where the one is on the side of the source and the other on that of the sink, whichever that is. Of all
cheapest cuts the one with the fewest operators on the side of first is taken, and there is just one such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx
from torch.fx import Node

_FIRST, _LAST = "first", "last"


def channels_first_at_least_cost(
    readers: Mapping[Node, Sequence[Node]],
    sizes: Mapping[Node, int],
    free: frozenset[Node],
    to_first: frozenset[Node],
    to_last: frozenset[Node],
    better_first: frozenset[Node] = frozenset(),
) -> frozenset[Node]:
    """The operators among `free` that are to compute with channels first.

    Args:
        readers: for each value who reads it.
        sizes: what turning each value costs.
        free: operators that compute in either layout.
        to_first: permutations that read a value with channels first, whatever it takes.
        to_last: permutations whose result is to be had with channels first for nothing.
        better_first: operators among `free` that compute with channels first where nothing is moved for it.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from((_FIRST, _LAST))

    def side(node: Node, fixed_first: frozenset[Node]) -> Node | str:
        return node if node in free else _FIRST if node in fixed_first else _LAST

    for value, users in readers.items():
        maker = side(value, to_last)
        sides = {side(user, to_first) for user in users}
        if sides <= {maker}:
            continue
        forwards, backwards = ("forwards", value), ("backwards", value)
        cost = sizes[value] * (len(better_first) + 1)  # the least of them outweighs all preferences
        graph.add_edge(maker, forwards, capacity=cost)
        graph.add_edge(backwards, maker, capacity=cost)
        for reader in sides - {maker}:
            graph.add_edge(forwards, reader)  # an arc without a capacity is never cut
            graph.add_edge(reader, backwards)
    graph.add_edges_from(((node, _FIRST) for node in better_first), capacity=1)
    _, (_, first) = networkx.minimum_cut(graph, _LAST, _FIRST)  # of all cuts, the one nearest to its sink
    return frozenset(node for node in first if node in free)
