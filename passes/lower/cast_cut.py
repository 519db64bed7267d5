"""The cheapest division of a graph in two: a minimum cut, by Dinic's algorithm."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

UNBOUNDED: Final = 1 << 50
"""A capacity that no cut may contain."""


class Network:
    """A network with a source and a sink, to be cut between them where that costs least.

    Attributes:
        source: Its vertex.
        sink: Its vertex.
    """

    def __init__(self, vertices: int) -> None:
        self.source, self.sink = vertices, vertices + 1
        self._edges: list[list[int]] = [[] for _ in range(vertices + 2)]
        self._to: list[int] = []
        self._room: list[int] = []

    def add_vertex(self) -> int:
        """Add a vertex and return it."""
        self._edges.append([])
        return len(self._edges) - 1

    def connect(self, start: int, end: int, capacity: int, back: int = 0) -> None:
        """Add an edge, with a capacity each way."""
        for vertex, other, room in ((start, end, capacity), (end, start, back)):
            self._edges[vertex].append(len(self._to))
            self._to.append(other)
            self._room.append(room)

    def connect_all(self, members: Sequence[int], capacity: int) -> None:
        """Let it cost `capacity`, once, to divide some vertices."""
        if len(members) == 2:
            self.connect(members[0], members[1], capacity, capacity)
            return
        entry, end = self.add_vertex(), self.add_vertex()
        self.connect(entry, end, capacity)
        for member in members:
            self.connect(member, entry, UNBOUNDED)
            self.connect(end, member, UNBOUNDED)

    def sink_side(self) -> set[int]:
        """Return the vertices on the sink's side: of several cheapest cuts, the fewest."""
        while (levels := self._levels()) is not None:
            self._block(levels)
        return self._reaches_sink()

    def _levels(self) -> list[int] | None:
        """Return distances from the source, None when the sink is out of reach."""
        levels = [-1] * len(self._edges)
        levels[self.source] = 0
        pending = deque([self.source])
        while pending:
            vertex = pending.popleft()
            for edge in self._edges[vertex]:
                other = self._to[edge]
                if self._room[edge] and levels[other] < 0:
                    levels[other] = levels[vertex] + 1
                    pending.append(other)
        return levels if levels[self.sink] >= 0 else None

    def _block(self, levels: list[int]) -> None:
        """Fill all shortest paths."""
        position = [0] * len(self._edges)
        path: list[int] = []
        vertex = self.source
        while True:
            if vertex == self.sink:
                amount = min(self._room[edge] for edge in path)
                for edge in path:
                    self._room[edge] -= amount
                    self._room[edge ^ 1] += amount
                path, vertex = [], self.source
            onward = self._next_edge(vertex, levels, position)
            if onward is not None:
                path.append(onward)
                vertex = self._to[onward]
            elif not path:
                return
            else:
                vertex = self._to[path.pop() ^ 1]
                position[vertex] += 1

    def _next_edge(self, vertex: int, levels: list[int], position: list[int]) -> int | None:
        edges = self._edges[vertex]
        while position[vertex] < len(edges):
            edge = edges[position[vertex]]
            if self._room[edge] and levels[self._to[edge]] == levels[vertex] + 1:
                return edge
            position[vertex] += 1
        return None

    def _reaches_sink(self) -> set[int]:
        reached = {self.sink}
        pending = [self.sink]
        while pending:
            for edge in self._edges[pending.pop()]:
                other = self._to[edge]
                if self._room[edge ^ 1] and other not in reached:
                    reached.add(other)
                    pending.append(other)
        return reached


def cheapest_division(
    groups: Iterable[Sequence[int]],
    group_cost: int,
    penalties: Sequence[int],
    forced: Iterable[int],
) -> set[int]:
    """Return which vertices go to the costly side.

    Args:
        groups: Vertices that should be on one side; dividing a group costs `group_cost`, once.
        group_cost: That cost.
        penalties: For each vertex, what it costs to be on the costly side.
        forced: Vertices that are there whatever it costs.
    """
    network = Network(len(penalties))
    held = set(forced)
    for vertex, penalty in enumerate(penalties):
        if vertex in held:
            network.connect(vertex, network.sink, UNBOUNDED)
        else:
            network.connect(network.source, vertex, penalty)
    for group in groups:
        network.connect_all(group, group_cost)
    return network.sink_side() & set(range(len(penalties)))
