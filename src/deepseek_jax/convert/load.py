"""Hugging Face folder -> parameters on a mesh, each process reading only what its devices hold."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.check import open_checked
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.convert.fp8 import E4M3, blocks
from deepseek_jax.convert.memory import Leaf, insert, leaves, lookup, scale_path
from deepseek_jax.convert.table import BLOCK_SIZE, Layout, axis_sizes, to_ours
from deepseek_jax.model.transformer import DeepSeekV3, abstract_params, logical_axes
from deepseek_jax.sharding import param_shardings
from deepseek_jax.types import Array, Params, UserError

LoadDtype = Literal["float32", "bfloat16", "fp8"] | None
_THREADS = 8


def load_hf(
    path: str | os.PathLike[str],
    *,
    dtype: LoadDtype = None,
    mesh: Mesh | None = None,
    stored: bool = True,
) -> tuple[ModelConfig, Params, Array]:
    """Load a checkpoint in Hugging Face's layout, without converting it first.

    Args:
        path: a folder with ``config.json`` and safetensors.
        dtype: of the parameters. None: as stored, FP8 weights as bfloat16. ``"fp8"``: as stored,
            with FP8 weights kept, and their scales beside them as ``<name>_scale``
            ``[..., ceil(in / 128), ceil(out / 128)]`` (axes as in the Hugging Face matrix,
            transposed: the heads of ``wq_b``, say, are one axis).
        mesh: where to put them, by the rules of ``sharding.py``; each process reads only the
            parts of its own devices. None: all on the first device.
        stored: False places them for serving, as in ``sharded_params``.

    Returns:
        ``(config, params, router_bias_LE)``; the bias is float32, zero where there is none.

    Raises:
        UserError: if the folder is incomplete, damaged, or of another architecture; or has no FP8
            weights to keep.
    """
    folder = open_checked(path)
    config = folder.config
    if dtype == "fp8" and not any(folder.is_fp8(name) for name in folder.tensors):
        raise UserError(
            f"{path} holds no FP8 weights to keep; load it in bfloat16, or make a folder in FP8 of "
            "it with `convert` twice, to a run directory and back with --dtype fp8."
        )
    tree: Params = {}
    places = _placement(config, mesh, stored)
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf in leaves(config):
            place = lookup(places, leaf.path)
            parts = _Parts(folder, leaf, stored_dtype(folder, leaf, dtype), pool)
            insert(tree, leaf.path, _place(leaf.shape, place, parts.get))
            if parts.dtype == E4M3:
                scales = stacked_scales(folder, leaf)
                at = _of_blocks(place, scales.ndim - 2)
                insert(tree, scale_path(leaf.path), _place(scales.shape, at, scales.__getitem__))
    if "router_bias" not in tree:
        no_bias = np.zeros((config.num_routers, config.n_routed_experts), np.float32)
        sharding = places["router_bias"]
        tree["router_bias"] = _place(no_bias.shape, sharding, no_bias.__getitem__)
    return config, tree["params"], tree["router_bias"]


def open_folder(folder: HFFolder) -> Params:
    """Every array of a checkpoint, FP8 as float32, to be sliced when it is wanted."""
    pool = ThreadPoolExecutor(_THREADS)
    tree: Params = {}
    for leaf in leaves(folder.config):
        kept = stored_dtype(folder, leaf, "fp8")
        dtype = np.dtype(np.float32) if kept == E4M3 else kept
        insert(tree, leaf.path, _Parts(folder, leaf, dtype, pool))
    return tree


def stacked_scales(folder: HFFolder, leaf: Leaf) -> np.ndarray:
    """All scales of an array whose weights stay in FP8, in the array's stacking."""
    check_blocks(leaf.layout, axis_sizes(folder.config), leaf.parts[0].shape)
    stack = leaf.shape[: len(leaf.parts[0].lead)]
    rows, cols = leaf.parts[0].shape
    out = np.empty((*stack, blocks(cols), blocks(rows)), np.float32)
    for entry in leaf.parts:
        if not folder.is_fp8(entry.name):
            raise UserError(
                f"{entry.name} is not in FP8 although {leaf.parts[0].name} is, so FP8 cannot be "
                "kept; convert to bfloat16 instead."
            )
        out[entry.lead] = folder.scale(entry.name).T
    return out


def check_blocks(layout: Layout, sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    """Refuse to keep FP8 where reordering for RoPE would carry a row into another scale's block.

    No released model is concerned: 64 rotated rows lie within one block of 128.
    """
    if not layout.rope:
        return
    P, head = sizes["P"], sizes[layout.rope]
    for last in range(head, shape[0] + 1, head):
        if (last - P) // BLOCK_SIZE != (last - 1) // BLOCK_SIZE:
            raise UserError(
                f"rows {last - P} to {last - 1} of a query or key matrix are rotated by RoPE and "
                f"lie in two FP8 blocks, so FP8 cannot be kept; convert to bfloat16 instead."
            )


def stored_dtype(folder: HFFolder, leaf: Leaf, dtype: LoadDtype) -> np.dtype:
    """What an array's dtype becomes when loaded with this option."""
    if leaf.path == ("router_bias",):
        return np.dtype(np.float32)
    stored = folder.read(leaf.parts[0].name, slice(0, 0)).dtype
    if dtype in ("float32", "bfloat16"):
        return np.dtype(jnp.dtype(dtype))
    return np.dtype(jnp.bfloat16) if stored == E4M3 and dtype is None else stored


class _Parts:
    """One of our arrays, of which any block can be asked for."""

    def __init__(self, folder: HFFolder, leaf: Leaf, dtype: np.dtype, pool: ThreadPoolExecutor):
        self.dtype = dtype
        self._folder, self._leaf, self._pool = folder, leaf, pool
        self._sizes = axis_sizes(folder.config)
        self._by_lead = {entry.lead: entry for entry in leaf.parts}
        self.shape, self.chunk = leaf.shape, None

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.get(tuple(slice(None) for _ in self.shape) if index is Ellipsis else index)

    def get(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(index, self._leaf.shape, strict=True)]
        depth = len(self._leaf.parts[0].lead)
        rows, cols, rest = _region(self._leaf.layout, self._sizes, ranges[depth:])
        leads = [()]
        for axis in ranges[:depth]:
            leads = [(*lead, i) for lead in leads for i in axis]

        def part(lead: tuple[int, ...]) -> np.ndarray:
            x = self._folder.weight(self._by_lead[lead].name, rows, cols, dtype=self.dtype)
            return to_ours(x, self._leaf.layout, self._sizes)[rest]

        first = part(leads[0])
        out = np.empty((len(leads), *first.shape), first.dtype)
        out[0] = first
        for i, x in enumerate(self._pool.map(part, leads[1:]), 1):
            out[i] = x
        return out.reshape([len(r) for r in ranges[:depth]] + list(first.shape))


def _region(
    layout: Layout, sizes: dict[str, int], ranges: list[range]
) -> tuple[slice, slice, tuple[slice, ...]]:
    """Rows and columns of the Hugging Face tensor that cover a block, and the block in them."""
    wanted = dict(zip(layout.ours, ranges, strict=True))
    found, rest = [], {letter: slice(r.start, r.stop) for letter, r in wanted.items()}
    for group in layout.groups:
        outer, inner = group[0], int(np.prod([sizes[letter] for letter in group[1:]]))
        if outer == layout.rope:  # reordered: the block's rows are not neighbours
            found.append(slice(None))
            continue
        found.append(slice(wanted[outer].start * inner, wanted[outer].stop * inner))
        rest[outer] = slice(None)
    found += [slice(None)] * (2 - len(found))
    return found[0], found[1], tuple(rest[letter] for letter in layout.ours)


def fp8_params(config: ModelConfig, params: Params) -> Params:
    """Abstract parameters with their linear layers in FP8, scales beside them.

    What a run directory in FP8 is read into.
    """
    tree = jax.tree.map(lambda x: x, params)
    for leaf in leaves(config):
        if not leaf.parts[0].row.fp8:
            continue
        x, (rows, cols) = lookup(params, leaf.path[1:]), leaf.parts[0].shape
        lead = len(leaf.parts[0].lead)
        shape, at = (*x.shape[:lead], blocks(cols), blocks(rows)), _of_blocks(x.sharding, lead)
        insert(tree, leaf.path[1:], jax.ShapeDtypeStruct(x.shape, E4M3, sharding=x.sharding))
        scale = jax.ShapeDtypeStruct(shape, np.float32, sharding=at)
        insert(tree, scale_path(leaf.path[1:]), scale)
    return tree


def _placement(config: ModelConfig, mesh: Mesh | None, stored: bool) -> Params:
    model = DeepSeekV3(config)
    axes = logical_axes(model)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        one = jax.tree.map(lambda _: device, axes, is_leaf=lambda x: isinstance(x, tuple))
        return {"params": one, "router_bias": device}
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = param_shardings(mesh, axes, abstract_params(model), stored=stored)
    return {"params": where, "router_bias": everywhere}


def _of_blocks(sharding: jax.sharding.Sharding, lead: int) -> jax.sharding.Sharding:
    """Where scales lie beside a matrix, as ``sharding.beside`` has it: divided as stacks are."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:lead]))
    return sharding


def _place(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, get: Callable[[Any], np.ndarray]
) -> jax.Array:
    """The array; ``get`` is asked once for each distinct block of this process."""
    held: dict[Any, np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in held:
            held[key] = get(index)
        return held[key]

    return jax.make_array_from_callback(shape, sharding, block)
