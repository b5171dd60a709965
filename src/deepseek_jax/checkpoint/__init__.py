"""Checkpoints over Orbax, and the identity of a run directory.

::

    out/pretrain/
        run.json                 what this run is: its configuration (`claim_run_directory`)
        checkpoints/1200/        one step
            model/               params and router bias; all that generation or the next stage reads
            optimizer/           step and optimizer state
            host/                data iterators, RNG key, anything else that is JSON
            checksums.json       size and CRC-32 of every file above, written last
        damaged-step-1100/       a checkpoint that failed its checksums, moved out of the way

Orbax writes a step into a temporary directory and renames it when complete, so a killed process
leaves no half-written step behind. It does not notice damage *after* that: TensorStore checks the
index of an array but not its chunks (in a trial, all of 24 single flipped bits in chunks came back
as wrong numbers without an error). Hence ``checksums.json``: it is written into the temporary
directory just before the rename, so that a visible step always has one, and a step is restored
only if every file still agrees with it. CRC-32 finds accidents, which is the aim, at several GB/s.

Directories must be on a POSIX file system that all processes share (local disk, NFS, Lustre,
gcsfuse). Nothing is pickled: arrays are Zarr, everything else is JSON.
"""

from deepseek_jax.checkpoint.checkpointer import Checkpointer, Restored, load_params
from deepseek_jax.checkpoint.run_directory import claim_run_directory

__all__ = ["Checkpointer", "Restored", "claim_run_directory", "load_params"]
