"""What a model *is*: the frozen ``ModelConfig``, its presets, and the number policy.

Field names are those of Hugging Face's ``config.json``, so that a checkpoint's file is read
directly. Nothing here says how a model is run: meshes are in ``sharding.py``, optimization in
``train/``.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from deepseek_jax.types import UserError

# The released code builds the two latent norms (q_a_layernorm, kv_a_layernorm) with RMSNorm's
# default epsilon whatever rms_norm_eps says; it matters for Moonlight (rms_norm_eps = 1e-5).
LATENT_NORM_EPS = 1e-6

# "selective" is the V3 report's recipe (section 3.2.3), see model/transformer.py.
RematPolicy = Literal["none", "full", "selective"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """The one place that says which number format is used where.

    RMSNorm, the router, softmax, the losses and RoPE's angles are float32 whatever this says
    (V3 section 3.3.1 keeps them in high precision).
    """

    params: Dtype = "float32"
    """Master weights."""
    compute: Dtype = "bfloat16"
    """Operands of matmuls, and activations between them."""
    accumulate: Dtype = "float32"
    """Partial sums inside matmuls."""
    logits: Dtype = "float32"
    """Output of the head, and what cross-entropy is computed in."""

    @property
    def param_dtype(self) -> Any:
        """Jax dtype of ``params``."""
        return jnp.dtype(self.params)

    @property
    def compute_dtype(self) -> Any:
        """Jax dtype of ``compute``."""
        return jnp.dtype(self.compute)


FLOAT32 = Precision(params="float32", compute="float32")


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al., 2023; V3 section 4.3). Names as in ``rope_scaling``."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a DeepSeek-V2/V3-family model; names as in ``config.json``.

    Raises:
        UserError: where two fields contradict one another, naming both and the remedy.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    """The first k layers have a dense FFN, the rest DeepSeekMoE."""
    num_attention_heads: int
    q_lora_rank: int | None
    """Latent width of queries (V3 Eq. 6); None: queries come straight from the hidden state."""
    kv_lora_rank: int
    """Latent width of keys and values (V3 Eq. 1)."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    """Each token may reach at most ``topk_group`` of ``n_group`` groups (V3 section 2.1.2)."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 1e-4
    """Weight of the complementary balance loss: V3 Eq. 17, or V2's expert-level loss."""
    seq_aux: bool = True
    """The balance loss is taken within each sequence (True) or over the micro-batch."""
    device_loss_alpha: float = 0.0
    """V2's device-level balance loss (V2 section 2.2.3), the groups being the devices."""
    communication_loss_alpha: float = 0.0
    """V2's communication balance loss (V2 section 2.2.3)."""
    num_nextn_predict_layers: int = 0
    """Depth D of multi-token prediction (V3 section 2.2)."""
    rope_theta: float = 10_000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    """Std of the initial weights: 0.006 in both reports; released files say 0.02, unused there."""
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        """Refuse contradictions while they are still one sentence away from their cause."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        E, G, K = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        checks = [
            (
                not 0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace={self.first_k_dense_replace} must lie between 0 and "
                f"num_hidden_layers={self.num_hidden_layers}.",
            ),
            (
                self.q_lora_rank is not None and self.q_lora_rank < 1,
                f"q_lora_rank={self.q_lora_rank} must be positive, or None for direct queries.",
            ),
            (
                self.qk_rope_head_dim % 2 != 0,
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs.",
            ),
            (
                self.n_shared_experts < 0 or self.num_nextn_predict_layers < 0,
                "n_shared_experts and num_nextn_predict_layers must not be negative.",
            ),
            (K > E, f"num_experts_per_tok={K} exceeds n_routed_experts={E}."),
            (E % G != 0, f"n_group={G} must divide n_routed_experts={E}."),
            (
                not 1 <= self.topk_group <= G,
                f"topk_group={self.topk_group} must lie between 1 and n_group={G}.",
            ),
            (
                self.topk_group * (E // G) < K,
                f"topk_group={self.topk_group} groups of {E // G} experts cannot supply "
                f"num_experts_per_tok={K}; raise topk_group.",
            ),
            (
                self.topk_method == "greedy" and G != 1,
                f"topk_method='greedy' ignores groups: set n_group=1 (it is {G}) or use "
                "'group_limited_greedy'.",
            ),
            (
                self.topk_method == "noaux_tc" and G > 1 and E // G < 2,
                f"noaux_tc scores a group by its two best experts, but n_group={G} leaves "
                f"{E // G} per group.",
            ),
            (
                self.topk_method == "noaux_tc" and self.scoring_func != "sigmoid",
                "topk_method='noaux_tc' (V3) goes with scoring_func='sigmoid'.",
            ),
            (
                self.topk_method != "noaux_tc" and self.scoring_func != "softmax",
                f"topk_method='{self.topk_method}' (V2) goes with scoring_func='softmax'.",
            ),
            (
                self.num_nextn_predict_layers > 0 and self.num_moe_layers == 0,
                "multi-token prediction modules are MoE blocks: num_nextn_predict_layers > 0 needs "
                "first_k_dense_replace < num_hidden_layers.",
            ),
        ]
        for failed, message in checks:
            if failed:
                raise UserError(message)

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model with DeepSeekMoE."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_routers(self) -> int:
        """Rows of ``router_bias_LE``: the MoE layers, then the MTP modules."""
        return self.num_moe_layers + self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: un-rotated plus rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(d) of V3 Eq. 10, times YaRN's temperature m^2 where context is extended."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face ``config.json`` (a path to it, or its contents).

        Raises:
            UserError: if the file is not of the DeepSeek-V2/V3 family or asks for something
                that no released model of the family uses.
        """
        return _from_hf(cls, _read_json(source) if not isinstance(source, dict) else source)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers and serving engines read; inverse of from_hf."""
        return _to_hf(self)


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "max_position_embeddings",
)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, m = 0.1 * mscale * ln(factor) + 1 (1 below factor 1)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# --- config.json -----------------------------------------------------------------------------

# What every released model of the family says; anything else would be silently wrong here.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
_FAMILIES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


def _read_json(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} could not be read as a config.json: {error}.") from error


def _from_hf(cls: type[ModelConfig], hf: dict[str, Any]) -> ModelConfig:
    family = hf.get("model_type")
    if family not in (*_FAMILIES, "kimi_k2"):
        raise UserError(
            f"model_type={family!r} is not of this family; expected deepseek_v2, deepseek_v3 or "
            "kimi_k2."
        )
    for name, expected in _FIXED.items():
        if hf.get(name, expected) != expected:
            raise UserError(
                f"config.json says {name}={hf[name]!r}; only {expected!r} is supported."
            )
    own = {f.name for f in dataclasses.fields(cls)}
    fields = {name: value for name, value in hf.items() if name in own}
    v2 = family == "deepseek_v2"
    fields.setdefault("topk_method", "greedy" if v2 else "noaux_tc")
    fields.setdefault("scoring_func", "softmax" if v2 else "sigmoid")
    # Written by newer transformers; the older flat fields otherwise.
    rope = hf.get("rope_parameters") or {}
    fields["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    fields["rope_scaling"] = _yarn_from_hf(hf.get("rope_scaling") or rope)
    if fields["topk_method"] == "greedy":  # the released code ignores the groups here
        fields["n_group"] = fields["topk_group"] = 1
    for name in ("n_group", "topk_group", "n_shared_experts"):
        if fields.get(name, 0) is None:
            fields[name] = 0 if name == "n_shared_experts" else 1
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.name not in fields
    ]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}.")
    return cls(**fields)


def _yarn_from_hf(scaling: dict[str, Any]) -> Yarn | None:
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"rope_scaling type {kind!r} is not supported; the family uses 'yarn'.")
    names = {f.name for f in dataclasses.fields(Yarn)}
    # The released code's defaults, which are not those of the released files.
    values: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 0.0} | scaling
    return Yarn(**{k: v for k, v in values.items() if k in names and v is not None})


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    hf = {k: v for k, v in dataclasses.asdict(config).items() if k != "rope_scaling"}
    family = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    else:
        hf["rope_scaling"] = None
    return {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        **_FIXED,
        "num_key_value_heads": config.num_attention_heads,
        "attention_dropout": 0.0,
        "use_cache": True,
        **hf,
    }


# --- presets ---------------------------------------------------------------------------------

_V3 = ModelConfig(
    vocab_size=129_280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope_scaling=Yarn(),
    max_position_embeddings=163_840,
)

_V2 = _V3.replace(
    vocab_size=102_400,
    hidden_size=5120,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    intermediate_size=12_288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_group=3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    aux_loss_alpha=0.003,
    device_loss_alpha=0.05,
    communication_loss_alpha=0.02,
    num_nextn_predict_layers=0,
    rope_scaling=Yarn(mscale=0.707, mscale_all_dim=0.707),
    bos_token_id=100_000,
    eos_token_id=100_001,
)

_V2_LITE = _V2.replace(
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    intermediate_size=10_944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.001,
    device_loss_alpha=0.0,
    communication_loss_alpha=0.0,
)

_MOONLIGHT_16B = _V2_LITE.replace(
    vocab_size=163_840,
    intermediate_size=11_264,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.446,
    aux_loss_alpha=1e-4,
    rope_theta=50_000.0,
    rope_scaling=None,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    bos_token_id=163_584,
    eos_token_id=163_586,
)

_KIMI_K2 = _V3.replace(
    vocab_size=163_840,
    first_k_dense_replace=1,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    rope_theta=50_000.0,
    rope_scaling=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0),
    max_position_embeddings=131_072,
    bos_token_id=163_584,
    eos_token_id=163_585,
)

# The teaching example: V3's mechanism at a size that one machine's memory holds.
_MINI = _V3.replace(
    vocab_size=32_000,
    hidden_size=1024,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=1024,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=4096,
    moe_intermediate_size=4096,
    n_routed_experts=64,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    rope_scaling=None,
    max_position_embeddings=4096,
)

# One GPU, minutes. Widths are multiples of 128, so FP8 blocks have no ragged edge.
_SMALL = _V3.replace(
    vocab_size=16_384,
    hidden_size=768,
    num_hidden_layers=12,
    first_k_dense_replace=1,
    num_attention_heads=12,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=2048,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
    max_position_embeddings=4096,
)

# Two CPU cores, minutes; every mechanism of V3 is on. Two heads and two experts per token
# because on a CPU it is the traffic of activations that takes the time, not the products.
_TINY = _SMALL.replace(
    vocab_size=2048,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=64,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_experts_per_tok=2,
    max_position_embeddings=2048,
    # 0.006 belongs to a width of 7168; a narrower model needs larger weights for the same signal.
    initializer_range=0.04,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "small": _SMALL,
    "mini": _MINI,
    "moonlight_16b": _MOONLIGHT_16B,
    "v2_lite": _V2_LITE,
    "v2": _V2,
    "v3": _V3,
    "r1": _V3,
    "kimi_k2": _KIMI_K2,
}


def preset(name: str) -> ModelConfig:
    """A complete published or teaching model by name (see ``PRESETS``).

    Raises:
        UserError: for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]
