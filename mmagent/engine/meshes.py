"""One device mesh for all that ranks share: copies of the model, its shards, its experts, and packs.

Ranks that share something are neighbours. ``context`` of them compute one pack, ``experts`` hold the experts of a
layer, ``shards`` hold one copy of everything, ``world`` are all; each of these numbers divides the next larger one. The
mesh has a dimension for each, the largest outermost, so that any of the groups is one of its dimensions or several
neighbouring ones taken together.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from itertools import pairwise

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from mmagent.dist import World


class RankMesh:
    """``sizes`` are neighbouring ranks by what they share, e.g. ``{"context": 2, "shards": 4}``; those left out share
    nothing. A collective. Raises ``ValueError`` where they do not fit into each other."""

    def __init__(self, world: World, sizes: Mapping[str, int]):
        self.world = world
        bounds = sorted(sizes.items(), key=lambda bound: bound[1])  # equal ones as they were named
        self.whole = bounds[-1][0] if bounds[-1] == ("shards", world.size) else "world"
        if self.whole == "world":
            bounds.append(("world", world.size))
        for (inner, few), (outer, many) in pairwise(bounds):
            if many % few:
                raise ValueError(f"{inner} {few} does not divide {outer} {many}: groups of ranks lie within each other")
        self.bounds = [("", 1), *bounds]
        dims = {outer[0]: outer[1] // inner[1] for inner, outer in pairwise(self.bounds)}
        self.root = world.mesh(dict(reversed(dims.items())))
        self._flat: dict[str, DeviceMesh] = {}

    def within(self, outer: str, inner: str = "") -> DeviceMesh:
        """The ranks of a group ``outer`` that have one place in their groups ``inner`` (by default, all of it), in one
        dimension."""
        names = self._between(inner, self.whole if outer == "world" else outer)
        if len(names) == 1:
            return self.root[names[0]]
        name = "_".join(names)
        if name not in self._flat:
            flat = self._flat[name] = self.root[tuple(names)]._flatten(name)
            _set_pg_timeout(timedelta(seconds=self.world.timeout), flat.get_group())
        return self._flat[name]

    def copies(self, shards: DeviceMesh) -> DeviceMesh:
        """In two dimensions: the world's groups of ``shards`` ranks, and ``shards``, which lies within them."""
        return DeviceMesh._concatenate([self.within("world", "shards"), shards])

    def _between(self, inner: str, outer: str) -> list[str]:
        """Dimensions of the mesh, outermost first."""
        order = [name for name, _ in self.bounds]
        return order[order.index(inner) + 1 : order.index(outer) + 1][::-1]
