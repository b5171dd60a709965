"""Bytes of activations that a layer keeps for its backward pass, per token, in BF16 and in FP8.

    python benchmarks/kept_activations.py --model small

Counted, not measured: the residuals of `jax.vjp` of the pretraining loss, traced and never run.
What grows with the number of tokens is activations, the rest weights; what another layer adds is
that layer's. Beside it, what the paper's scheme caches (V3 section 3.3.3): inputs of products in
FP8, that of attention's output projection in 12 bits, and SwiGLU's inputs in FP8, its output
recomputed.
"""

import argparse
import collections
from typing import Any, Literal

import jax
import jax.numpy as jnp

from deepseek_jax import Batch, DeepSeekV3, ModelConfig, preset
from deepseek_jax.config import Precision, RematPolicy
from deepseek_jax.model.transformer import abstract_params, init_router_bias
from deepseek_jax.train.losses import Totals, pretrain_loss

Bytes = collections.Counter[str]  # by dtype
KINDS = ("MoE", "dense")
FORMATS: tuple[Literal["compute", "fp8"], ...] = ("compute", "fp8")


def kept(config: ModelConfig, precision: Precision, remat: RematPolicy, seq_len: int) -> Bytes:
    """Of the whole model, per token, by dtype; with whole rows, and no MTP modules."""
    model = DeepSeekV3(config, precision, remat, whole_rows=True)

    def residuals(params: Any, batch: Batch) -> Any:
        totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(1))
        bias_LE = init_router_bias(config)
        loss = lambda p: pretrain_loss(model, p, bias_LE, batch, totals, None)  # noqa: E731
        return jax.vjp(loss, params, has_aux=True)[1]

    def count(rows: int) -> Bytes:
        ints, floats = (jax.ShapeDtypeStruct((rows, seq_len), d) for d in (jnp.int32, jnp.float32))
        batch = Batch(ints, ints, floats, ints, ints)
        found: Bytes = collections.Counter()
        for x in jax.tree.leaves(jax.eval_shape(residuals, abstract_params(model), batch)):
            # Nothing else is kept as bytes (`pallas_kernels.linear.as_bytes`).
            name = "float8_e4m3fn" if x.dtype == jnp.uint8 else str(x.dtype)
            found[name] += x.size * x.dtype.itemsize
        return found

    one, two = count(1), count(2)
    return collections.Counter({k: (two[k] - one[k]) / seq_len for k in two if two[k] > one[k]})


def per_layer(
    config: ModelConfig, precision: Precision, remat: RematPolicy, seq_len: int
) -> dict[str, Bytes]:
    """Of one layer of each kind, per token, by dtype: what one more of it adds."""

    def of(moe: int, dense: int) -> Bytes:
        layers = {"num_hidden_layers": moe + dense, "first_k_dense_replace": dense}
        less = config.replace(num_nextn_predict_layers=0, **layers)
        return kept(less, precision, remat, seq_len)

    both = of(1, 1)
    return {"MoE": of(2, 1) - both, "dense": of(1, 2) - both}


def cached_by_the_paper(config: ModelConfig, matmuls: str) -> dict[str, float]:
    """Inputs of a layer's products and of its SwiGLU, per token (V3 section 3.3.3).

    In FP8 a byte and a 128th of a float32 scale, 12 bits for the input of attention's output
    projection; in BF16 two bytes. Normed inputs and latents are counted, though the paper may
    recompute them from what is there before the norm (section 3.2.3).
    """
    c = config
    D, K = c.hidden_size, c.num_experts_per_tok
    value, heads = (1 + 4 / 128, 1.5 + 4 / 128) if matmuls == "fp8" else (2.0, 2.0)
    attention = (D + (c.q_lora_rank or 0) + c.kv_lora_rank) * value
    attention += c.num_attention_heads * c.v_head_dim * heads
    shared = 2 * c.n_shared_experts * c.moe_intermediate_size
    routed = K * (D + 2 * c.moe_intermediate_size)
    return {
        "MoE": attention + (D + shared + routed) * value,
        "dense": attention + (D + 2 * c.intermediate_size) * value,
    }


def table(config: ModelConfig, seq_len: int, policies: tuple[RematPolicy, ...]) -> list[str]:
    """The lines of a Markdown table, bytes per token."""
    lines = [
        "| recomputation | layer | BF16 | of it float32 | FP8 | of it E4M3, float32 | FP8 / BF16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for remat in policies:
        found = {m: per_layer(config, Precision(matmuls=m), remat, seq_len) for m in FORMATS}
        for kind in KINDS:
            plain, fp8 = found["compute"][kind], found["fp8"][kind]
            lines.append(
                f"| {remat} | {kind} | {plain.total():,.0f} | {plain['float32']:,.0f} | "
                f"{fp8.total():,.0f} | {fp8['float8_e4m3fn']:,.0f}, {fp8['float32']:,.0f} | "
                f"{fp8.total() / plain.total():.2f} |"
            )
    plain, fp8 = (cached_by_the_paper(config, m) for m in FORMATS)
    lines += [
        f"| (inputs of products and SwiGLU, the paper's formats) | {kind} | {plain[kind]:,.0f} | 0 "
        f"| {fp8[kind]:,.0f} | | {fp8[kind] / plain[kind]:.2f} |"
        for kind in KINDS
    ]
    return lines


def main() -> None:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--remat", nargs="*", default=["none", "selective"])
    arguments = parser.parse_args()
    print(f"{arguments.model}, bytes per token and layer kept for the backward pass:")
    print("\n".join(table(preset(arguments.model), arguments.seq, tuple(arguments.remat))))


if __name__ == "__main__":
    main()
