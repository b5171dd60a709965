"""Conversion of a whole model in memory: what the streaming converter does, in a few lines."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.table import Entry, axis_sizes, entries, parse, to_hf, to_ours
from deepseek_jax.sharding import SCALE
from deepseek_jax.types import Array, Params


class Leaf:
    """One of our arrays and the tensors it is stacked from."""

    def __init__(self, path: tuple[str, ...], shape: tuple[int, ...], parts: list[Entry]):
        self.path, self.shape, self.parts = path, shape, parts
        self.layout = parse(parts[0].row.layout)


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """Our arrays, in the order in which the table first mentions them."""
    parts: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries(config):
        if not entry.row.copy:
            parts.setdefault(entry.path, []).append(entry)
    sizes = axis_sizes(config)
    for path, group in parts.items():
        stack = tuple(1 + i for i in group[-1].lead)
        own = (sizes[letter] for letter in parse(group[0].row.layout).ours)
        yield Leaf(path, (*stack, *own), group)


def scale_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where the scales of an array kept in FP8 are: beside it, as ``<name>_scale``."""
    return (*path[:-1], path[-1] + SCALE)


def insert(tree: Params, path: tuple[str, ...], value: object) -> None:
    """``tree[path[0]][path[1]]... = value``, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def lookup(tree: Params, path: tuple[str, ...]) -> Any:
    """``tree[path[0]][path[1]]...``."""
    for key in path:
        tree = tree[key]
    return tree


def params_from_hf(
    config: ModelConfig, get: Callable[[str], np.ndarray]
) -> tuple[Params, np.ndarray]:
    """Our parameters and router bias from Hugging Face tensors.

    Args:
        config: the model.
        get: the tensor of a name, as a NumPy array in torch's layout.

    Returns:
        ``(params, router_bias_LE)``; dtypes as given. The bias is zero where the family has none.
    """
    sizes = axis_sizes(config)
    tree: Params = {}
    for leaf in leaves(config):
        first = get(leaf.parts[0].name)
        out = np.empty(leaf.shape, first.dtype)
        for entry in leaf.parts:
            out[entry.lead] = to_ours(get(entry.name), parse(entry.row.layout), sizes)
        insert(tree, leaf.path, out)
    no_bias = np.zeros((config.num_routers, config.n_routed_experts), np.float32)
    return tree["params"], tree.get("router_bias", no_bias)


def hf_from_params(
    config: ModelConfig, params: Params, router_bias: Array
) -> dict[str, np.ndarray]:
    """Inverse of ``params_from_hf``: tensors by their Hugging Face names."""
    sizes = axis_sizes(config)
    tree = {"params": params, "router_bias": router_bias}
    return {
        entry.name: to_hf(
            np.asarray(lookup(tree, entry.path)[entry.lead]), parse(entry.row.layout), sizes
        )
        for entry in entries(config)
    }
