"""How long a collective takes on a torus of chips, and over the data-centre network between tori.

The model (scaling book, "Sharded matrices"): a collective over a ring moves data both ways at once, so gathering an
array of V bytes takes V / (2 · link) along one side, V / (4 · link) over two sides, however many chips there are. A
side that does not close to a ring is a line and half as fast. Members of a group that lie in several slices exchange
between slices what one slice has reduced, through the network cards of their hosts, which their chips share.
"""

import numpy as np
from jax.sharding import Mesh

from vla_jax.aot.collectives import Collective
from vla_jax.aot.topology import Topology
from vla_jax.sharding.mesh import slice_of


class Network:
    """Times on a topology, for collectives named by positions in a mesh."""

    def __init__(self, topology: Topology, mesh: Mesh):
        self.topology = topology
        devices = mesh.devices.reshape(-1)
        self.places = np.array([(slice_of(d), *d.coords[: topology.chip.dimensions]) for d in devices])
        hosts = len({(slice_of(d), d.process_index) for d in devices})
        self.chips_per_host = len(devices) // hosts

    def seconds(self, collective: Collective) -> float:
        """Time of one collective when nothing else uses its links."""
        if len(collective.group) < 2 or not collective.bytes:
            return 0.0
        chip = self.topology.chip
        places = self.places[list(collective.group)]
        slices = len(np.unique(places[:, 0]))
        inside = places[places[:, 0] == places[0, 0]][:, 1:]
        if collective.kind == "collective-permute":
            return self._permute(collective.bytes, places)
        seconds = self._inside(collective, inside)
        if slices > 1:
            # Each chip of a slice exchanges its share of the reduced array with its peers in the other slices.
            over = collective.bytes / len(inside) if len(inside) > 1 else collective.bytes
            seconds += over / (chip.dcn / self.chips_per_host)
        return seconds

    def peers(self) -> tuple[int, ...]:
        """Positions in the flattened mesh of chips at the same place of each slice."""
        place = self.places[0, 1:]
        return tuple(int(i) for i in np.flatnonzero((self.places[:, 1:] == place).all(axis=1)))

    def crosses(self, collective: Collective) -> bool:
        """Whether it needs the data-centre network."""
        return len(np.unique(self.places[list(collective.group)][:, 0])) > 1

    def _inside(self, collective: Collective, places: np.ndarray) -> float:
        chip = self.topology.chip
        bandwidth, hops, distance = 0.0, 0.0, 0.0
        for side, coordinates in zip(self.topology.sides, places.T):
            members = len(np.unique(coordinates))
            if members > 1:
                ring = self._closes(members, side)
                bandwidth += chip.link * (2 if ring else 1)
                hops += members / 2 if ring else members - 1
                distance += members / 4 if ring else members / 3
        if not bandwidth:
            return 0.0
        received = collective.bytes
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            received *= max(
                1.0, distance
            )  # nothing is combined on the way: each byte takes every link of its path
        return max(received / bandwidth, chip.hop * hops)

    def _permute(self, received: float, places: np.ndarray) -> float:
        """One sender, one receiver: a link, hop by hop, or the hosts' network cards."""
        chip = self.topology.chip
        if places[0, 0] != places[-1, 0]:
            return received / (chip.dcn / self.chips_per_host)
        hops = 0
        for side, a, b in zip(self.topology.sides, places[0, 1:], places[-1, 1:]):
            apart = abs(int(a) - int(b))
            hops += min(apart, side - apart) if self._closes(side, side) else apart
        return max(received / chip.link, chip.hop * hops)

    def _closes(self, members: int, side: int) -> bool:
        """Whether so many chips of a side form a ring: the whole side, where the torus is wired round."""
        return members == side and side % self.topology.chip.wrap == 0
