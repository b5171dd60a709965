"""The ring of shared-memory stages between a producer warpgroup and its consumers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Of a thread of the producer and of a consumer, by the number of consumers; as they come for one.
REGISTERS = {2: (40, 232), 3: (32, 160)}


def empty_barriers(consumers: int, stages: int, cluster: int):
    """By which consumers give stages back, to the producers of all blocks that share them."""
    sizes = dict(num_arrivals=consumers, num_barriers=stages)
    if cluster == 1:
        return plgpu.Barrier(**sizes)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), **sizes)


def in_cluster(blocks: int) -> dict[str, Any]:
    """What a kernel is given to run in clusters of so many blocks along the axis "cluster"."""
    return dict(cluster=(blocks,), cluster_names=("cluster",)) if blocks > 1 else {}


class Position(NamedTuple):
    """The producer's place in the ring: the next stage, and how many have been filled so far."""

    slot: jax.Array
    filled: jax.Array


class Ring(NamedTuple):
    """A number of stages, walked around without division: the number need not be a power of 2."""

    stages: int

    def next_slot(self, slot):
        """The stage after ``slot``."""
        return lax.select(slot == self.stages - 1, jnp.int32(0), slot + 1)

    def start(self) -> Position:
        """Where a producer begins, with every stage empty."""
        return Position(jnp.int32(0), jnp.int32(0))

    def acquire(self, position: Position, empty):
        """Wait until the stage at ``position`` may be written."""

        @pl.when(position.filled == self.stages)
        def _():
            plgpu.barrier_wait(empty.at[position.slot])

    def advance(self, position: Position) -> Position:
        """The position after filling a stage; ``filled`` stops at a full ring."""
        filled = lax.min(position.filled + 1, jnp.int32(self.stages))
        return Position(self.next_slot(position.slot), filled)

    def drain(self, position: Position, empty):
        """Wait for every stage that was filled to be given back.

        A block must outlive what its neighbour in the cluster still signals to it.
        """
        full = position.filled == self.stages
        oldest = lax.select(full, position.slot, jnp.int32(0))

        def wait(_, slot):
            plgpu.barrier_wait(empty.at[slot])
            return self.next_slot(slot)

        lax.fori_loop(0, position.filled, wait, oldest)
