"""The one table between our parameters and Hugging Face's tensor names, read in both directions.

A row names our parameter, the tensor of a released checkpoint, and how the axes of one become
those of the other, as in einops: ``"(N H) Q -> Q N H"`` is a torch matrix ``[out, in]`` whose
rows are the heads' outputs, head after head, and our array with the input axis first. Letters
are those of ``types.py``, with five more: ``I`` width of the dense FFN, ``S`` of all shared
experts side by side, ``X`` = C + O (keys and values of a head), ``Z`` = R + P (latent and k_pe),
``U`` = 2D.

``~`` marks an axis whose last P entries RoPE rotates. Released checkpoints pair neighbours there
(2i with 2i + 1), we pair halves (i with i + P/2): the entries are reordered to
[0, 2, 4, ..., 1, 3, 5, ...], so that nothing is shuffled when the model runs.

``fp8`` marks what an FP8 checkpoint stores in FP8 with its scales in ``..._scale_inv``; embedding,
head, norms, router and ``eh_proj`` stay in BF16 (V3 section 3.3.1).

Adding an architecture is adding rows.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ModelConfig


class Row(NamedTuple):
    """One line of the table; ``{i}`` is the layer, ``{e}`` the expert."""

    ours: str
    hf: str
    layout: str
    fp8: bool = False
    only: Callable[[ModelConfig], bool] = lambda config: True
    copy: bool = False
    """A second copy of another row's tensor: written, and looked at only to see that it agrees."""


def _low_rank(config: ModelConfig) -> bool:
    return config.q_lora_rank is not None


def _direct(config: ModelConfig) -> bool:
    return config.q_lora_rank is None


def _biased(config: ModelConfig) -> bool:
    return config.topk_method == "noaux_tc"


def _shared(config: ModelConfig) -> bool:
    return config.n_shared_experts > 0


_L = "model.layers.{i}."
_A = _L + "self_attn."
_M = _L + "mlp."
_S = _M + "shared_experts."

# fmt: off
MODEL = (
    Row("embed", "model.embed_tokens.weight", "V D -> V D"),
    Row("norm", "model.norm.weight", "D -> D"),
    Row("head", "lm_head.weight", "V D -> D V"),
)
BLOCK = (
    Row("attn_norm", _L + "input_layernorm.weight", "D -> D"),
    Row("attn/wq", _A + "q_proj.weight", "(N H~) D -> D N H~", fp8=True, only=_direct),
    Row("attn/wq_a", _A + "q_a_proj.weight", "Q D -> D Q", fp8=True, only=_low_rank),
    Row("attn/q_norm", _A + "q_a_layernorm.weight", "Q -> Q", only=_low_rank),
    Row("attn/wq_b", _A + "q_b_proj.weight", "(N H~) Q -> Q N H~", fp8=True, only=_low_rank),
    Row("attn/wkv_a", _A + "kv_a_proj_with_mqa.weight", "Z~ D -> D Z~", fp8=True),
    Row("attn/kv_norm", _A + "kv_a_layernorm.weight", "R -> R"),
    Row("attn/wkv_b", _A + "kv_b_proj.weight", "(N X) R -> R N X", fp8=True),
    Row("attn/wo", _A + "o_proj.weight", "D (N O) -> N O D", fp8=True),
    Row("ffn_norm", _L + "post_attention_layernorm.weight", "D -> D"),
)
DENSE = (
    Row("ffn/w1", _M + "gate_proj.weight", "I D -> D I", fp8=True),
    Row("ffn/w3", _M + "up_proj.weight", "I D -> D I", fp8=True),
    Row("ffn/w2", _M + "down_proj.weight", "D I -> I D", fp8=True),
)
MOE = (
    Row("moe/gate", _M + "gate.weight", "E D -> D E"),
    Row("router_bias", _M + "gate.e_score_correction_bias", "E -> E", only=_biased),
    Row("moe/w1", _M + "experts.{e}.gate_proj.weight", "F D -> D F", fp8=True),
    Row("moe/w3", _M + "experts.{e}.up_proj.weight", "F D -> D F", fp8=True),
    Row("moe/w2", _M + "experts.{e}.down_proj.weight", "D F -> F D", fp8=True),
    Row("moe/shared_experts/w1", _S + "gate_proj.weight", "S D -> D S", fp8=True, only=_shared),
    Row("moe/shared_experts/w3", _S + "up_proj.weight", "S D -> D S", fp8=True, only=_shared),
    Row("moe/shared_experts/w2", _S + "down_proj.weight", "D S -> S D", fp8=True, only=_shared),
)
MTP = (  # eh_proj's columns: first the embedding's, then the hidden state's (model/mtp.py)
    Row("embed", _L + "embed_tokens.weight", "V D -> V D", copy=True),
    Row("enorm", _L + "enorm.weight", "D -> D"),
    Row("hnorm", _L + "hnorm.weight", "D -> D"),
    Row("eh_proj", _L + "eh_proj.weight", "D U -> U D"),
    Row("norm", _L + "shared_head.norm.weight", "D -> D"),
    Row("head", _L + "shared_head.head.weight", "V D -> D V", copy=True),
)
# fmt: on

SCALE = "_scale_inv"
"""What an FP8 tensor's name is followed by in the name of its scales."""
BLOCK_SIZE = 128
"""Rows and columns that share one FP8 scale."""


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """How long each axis letter of the table is."""
    c = config
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "U": 2 * c.hidden_size,
        "N": c.num_attention_heads,
        "H": c.qk_head_dim,
        "Q": c.q_lora_rank or 0,
        "R": c.kv_lora_rank,
        "X": c.qk_nope_head_dim + c.v_head_dim,
        "Z": c.kv_lora_rank + c.qk_rope_head_dim,
        "O": c.v_head_dim,
        "P": c.qk_rope_head_dim,
        "I": c.intermediate_size,
        "F": c.moe_intermediate_size,
        "S": c.n_shared_experts * c.moe_intermediate_size,
        "E": c.n_routed_experts,
    }


class Entry(NamedTuple):
    """One tensor of a Hugging Face checkpoint, and its place in ours."""

    name: str
    shape: tuple[int, ...]
    row: Row
    path: tuple[str, ...]
    """Keys in the tree ``{"params": ..., "router_bias": ...}``."""
    lead: tuple[int, ...]
    """Where in the stacked array: (), (layer,) or (layer, expert)."""


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the checkpoint of this model, layer by layer; FP8 scales not listed."""
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    yield from _expand(config, MODEL[:1], "")
    for i in range(dense):
        yield from _expand(config, BLOCK + DENSE, "dense_layers/", i, (i,))
    for i in range(dense, layers):
        yield from _expand(config, BLOCK + MOE, "moe_layers/", i, (i - dense,))
    yield from _expand(config, MODEL[1:], "")
    for k in range(config.num_nextn_predict_layers):
        yield from _expand(config, MTP, f"mtp_{k}/", layers + k)
        yield from _expand(config, BLOCK + MOE, f"mtp_{k}/block/", layers + k)


def _expand(
    config: ModelConfig, rows: tuple[Row, ...], prefix: str, i: int = -1, lead: tuple[int, ...] = ()
) -> Iterator[Entry]:
    sizes = axis_sizes(config)
    for row in rows:
        if not row.only(config):
            continue
        groups = parse(row.layout).groups
        shape = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
        path = ("params", *((prefix if not row.copy else "") + row.ours).split("/"))
        at = lead
        if row.ours == "router_bias":  # one array for all routers, the MTP modules' last
            path, at = ("router_bias",), (i - config.first_k_dense_replace,)
        if "{e}" in row.hf:
            for e in range(config.n_routed_experts):
                yield Entry(row.hf.format(i=i, e=e), shape, row, path, (*at, e))
        else:
            yield Entry(row.hf.format(i=i), shape, row, path, at)


# --- layouts ---------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A parsed layout string."""

    groups: tuple[str, ...]
    """Letters of each axis of the Hugging Face tensor, outer letter first."""
    ours: str
    """Letters of our axes."""
    rope: str
    """The letter marked with ``~``, or nothing."""


@functools.cache
def parse(layout: str) -> Layout:
    """``"(N H~) Q -> Q N H~"`` -> Layout(("NH", "Q"), "QNH", "H")."""
    left, right = layout.replace(" ", "").split("->")
    rope = left[left.index("~") - 1] if "~" in left else ""
    groups = re.findall(r"\((\w+)\)|(\w)", left.replace("~", ""))
    return Layout(tuple(a or b for a, b in groups), right.replace("~", ""), rope)


def to_ours(x: np.ndarray, layout: Layout, sizes: dict[str, int]) -> np.ndarray:
    """A Hugging Face tensor, or a part of its rows or columns (whole heads), in our layout."""
    letters = "".join(layout.groups)
    x = x.reshape(_split(x.shape, layout.groups, sizes))
    if layout.rope:
        order = half_split_order(sizes[layout.rope], sizes["P"])
        x = np.take(x, order, axis=letters.index(layout.rope))
    return x.transpose([letters.index(letter) for letter in layout.ours])


def to_hf(x: np.ndarray, layout: Layout, sizes: dict[str, int]) -> np.ndarray:
    """Inverse of ``to_ours``."""
    if layout.rope:
        order = np.argsort(half_split_order(sizes[layout.rope], sizes["P"]))
        x = np.take(x, order, axis=layout.ours.index(layout.rope))
    length = dict(zip(layout.ours, x.shape, strict=True))
    x = contiguous(x.transpose([layout.ours.index(letter) for letter in "".join(layout.groups)]))
    return x.reshape([math.prod(length[letter] for letter in group) for group in layout.groups])


def contiguous(x: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """``x`` in C order, filled up with zeros to ``shape``.

    A transposed view is copied a cache line of the result at a time, six times sooner than by
    numpy alone; conversion is mostly this.
    """
    padded = shape is not None and shape != x.shape
    out = np.zeros(shape, x.dtype) if padded else np.empty(x.shape, x.dtype)
    inside = out[tuple(slice(length) for length in x.shape)]
    step = 64 // x.itemsize
    for i in range(0, x.shape[-1], step):
        inside[..., i : i + step] = x[..., i : i + step]
    return out


def half_split_order(size: int, P: int) -> np.ndarray:
    """Which of the interleaved entries comes at each place; only the last P entries move."""
    rope = np.arange(size - P, size)
    return np.concatenate([np.arange(size - P), rope[0::2], rope[1::2]])


def _split(shape: tuple[int, ...], groups: tuple[str, ...], sizes: dict[str, int]) -> list[int]:
    """Lengths of the single letters; the outer letter of a group may be a part of its axis."""
    lengths = []
    for length, group in zip(shape, groups, strict=True):
        inner = [sizes[letter] for letter in group[1:]]
        lengths += [length // math.prod(inner), *inner]
    return lengths
