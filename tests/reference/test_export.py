"""transformers opens what we export, as it is, and computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deepseek_jax import DeepSeekV3, forward  # noqa: E402
from deepseek_jax.config import FLOAT32  # noqa: E402
from deepseek_jax.convert import export_hf, load_hf  # noqa: E402
from deepseek_jax.model.transformer import abstract_params  # noqa: E402
from deepseek_jax.presets import preset  # noqa: E402
from tests.reference.test_logits import CONFIGS  # noqa: E402


def random_params(config, seed=0):
    random = np.random.default_rng(seed)

    def draw(x):
        scale = 1 / x.shape[-2] ** 0.5 if x.ndim > 1 else 0.2
        return jnp.asarray((x.ndim == 1) + scale * random.standard_normal(x.shape), x.dtype)

    params = jax.tree.map(draw, abstract_params(DeepSeekV3(config)))
    bias = random.standard_normal((config.num_routers, config.n_routed_experts))
    v3 = config.topk_method == "noaux_tc"
    return params, jnp.asarray(bias * v3, jnp.float32)


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", ["v3_mtp", "v2_lite"])
def test_transformers_computes_the_same_from_our_export(name, tmp_path):
    v3_mtp = CONFIGS["v3_yarn"].replace(num_nextn_predict_layers=1)
    config = v3_mtp if name == "v3_mtp" else CONFIGS[name]
    params, bias = random_params(config)
    export_hf(tmp_path, config, params, bias, dtype="fp32", shard_size=100_000)
    model = opened(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    ours = jax.jit(forward, static_argnums=0)(config, params, bias, tokens)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.std())


def test_mtp_equals_transformers_module(tmp_path):
    """Its ``MtpModel`` finds the module at layer 61 only, hence as many layers here."""
    from transformers.modeling_layers import MtpModel

    config = CONFIGS["v3"].replace(
        num_hidden_layers=61, first_k_dense_replace=60, num_nextn_predict_layers=1, hidden_size=24
    )
    params, bias = random_params(config)
    export_hf(tmp_path, config, params, bias, dtype="fp32")
    main = opened(tmp_path)
    mtp = MtpModel.from_pretrained(main).eval()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        states = main(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
        hidden = mtp.forward_layer(
            0,
            states[-1][:, :-1],
            torch.arange(1, 20)[None],
            None,
            input_ids=torch.from_numpy(tokens[:, 1:]),
        )
        theirs = mtp.shared_head(hidden).numpy()
    model = DeepSeekV3(config, FLOAT32)

    def mtp_logits(params, tokens):
        return model.apply({"params": params}, tokens, bias).mtp_logits

    (ours,) = jax.jit(mtp_logits)(params, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.std())


def test_fp8_export_opens_in_transformers(tmp_path):
    """Multiplied out by transformers on opening. Its blocks must be whole: widths of 128."""
    config = CONFIGS["v3"].replace(
        hidden_size=128,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=128,
        qk_nope_head_dim=64,
        v_head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=128,
    )
    params, bias = random_params(config)
    export_hf(tmp_path, config, params, bias, dtype="fp8")
    multiply_out = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=multiply_out
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs.eval().float()(torch.from_numpy(tokens)).logits.numpy()
    config, params, bias = load_hf(tmp_path, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ours = jax.jit(
        lambda params: forward(config, params, bias, jnp.asarray(tokens)),
    )(params)
    # Measured 1.6e-4: transformers runs its default attention here, not the eager one. A block
    # with another's scale shows as more than 1.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-4 * expected.std())


@pytest.mark.slow
def test_greedy_text_of_a_trained_model_is_the_same(tmp_path):
    """The demo's model after a few steps: our ``complete`` and transformers', token by token."""
    from deepseek_jax.checkpoint import load_params
    from deepseek_jax.convert import convert_to_hf
    from deepseek_jax.data.pipeline import DataConfig
    from deepseek_jax.data.tokenizer import Tokenizer
    from deepseek_jax.generate import Sampling, complete
    from deepseek_jax.train.loop import LoopConfig
    from deepseek_jax.train.optim import OptimConfig
    from deepseek_jax.train.pretrain import PretrainConfig, pretrain

    pretrain(
        PretrainConfig(
            out=tmp_path / "run",
            precision=FLOAT32,
            data=DataConfig(source=("stdlib",), seq_len=128),
            loop=LoopConfig(steps=60, batch_size=8, eval_batches=2),
            optim=OptimConfig(peak_lr=3e-3),
        )
    )
    convert_to_hf(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = opened(tmp_path / "hf")
    prompt = tokenizer("def __init__(self, ", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=None)
    params, bias, _ = load_params(tmp_path / "run")
    (ours,) = complete(
        DeepSeekV3(preset("tiny"), FLOAT32),
        params,
        bias,
        Tokenizer.load(tmp_path / "run"),
        [prompt[0].tolist()],
        Sampling(60, temperature=0.0),
    )
    assert ours == tokenizer.decode(theirs[0, prompt.shape[1] :], skip_special_tokens=True)


def test_fp8_means_what_it_means_to_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from deepseek_jax.convert.fp8 import dequantize, quantize

    w = np.random.default_rng(0).standard_normal((384, 256)).astype(np.float32)
    q, scale = quantize(w)
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(q.view(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scale),
        torch.float32,
    )
    np.testing.assert_array_equal(dequantize(q, scale), theirs.numpy())
    np.testing.assert_array_equal(
        dequantize(q[128:300, 37:], scale, 128, 37), theirs.numpy()[128:300, 37:]
    )
