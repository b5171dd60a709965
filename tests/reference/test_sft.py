"""Fine-tuning equals a plain loop over conversations with transformers: tokens, loss, gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deepseek_jax import DeepSeekV3  # noqa: E402
from deepseek_jax.config import FLOAT32  # noqa: E402
from deepseek_jax.data.chat import DEEPSEEK, ChatTemplate  # noqa: E402
from deepseek_jax.data.conversations import Message  # noqa: E402
from deepseek_jax.data.packing import fill_row, pack_samples, rows_to_batch  # noqa: E402
from deepseek_jax.data.tokenizer import BOS, EOS, train_bpe  # noqa: E402
from deepseek_jax.train.losses import Totals, pretrain_loss  # noqa: E402
from tests.reference.test_logits import CONFIGS  # noqa: E402
from tests.reference.torch_models import our_params, torch_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SEQ_LEN = 96
TALKS = [
    [("user", "What is 2 + 3?"), ("assistant", "It is 5.")],
    [
        ("system", "Be brief."),
        ("user", "Name a colour."),
        ("assistant", "Red."),
        ("user", "Another."),
        ("assistant", "Blue, then."),
    ],
    [("user", "Why?"), ("assistant", "Because.")],
    [("user", "Say nothing long."), ("assistant", "Fine.")],
]


def theirs(config, model, tokenizer) -> tuple[float, int, list[list[int]]]:
    """Loss over the assistant's tokens of each conversation by itself, and ``.grad`` of the mean.

    The mask is found by rendering every prefix of turns with ``apply_chat_template``.
    """
    render = functools.partial(
        tokenizer.apply_chat_template, chat_template=DEEPSEEK, return_dict=False
    )
    total, count, all_ids = torch.zeros(()), 0, []
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        ids = render(messages)
        learnt = torch.zeros(len(ids), dtype=torch.bool)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                first = len(render(messages[:i], add_generation_prompt=True))
                learnt[first : len(render(messages[: i + 1]))] = True
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        total = total + nats[learnt[1:]].sum()
        count += int(learnt[1:].sum())
        all_ids.append(ids)
    (total / count).backward()
    return total.item() / count, count, all_ids


def test_loss_and_gradients_are_those_of_transformers(tmp_path):
    bpe = train_bpe([content for talk in TALKS for _, content in talk], 300)
    bpe.save(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    config = CONFIGS["v3"].replace(vocab_size=300, aux_loss_alpha=0.0)
    model = torch_model(config)
    params, bias = our_params(config, model, tmp_path / "weights")

    template = ChatTemplate(DEEPSEEK, bpe, "ours")
    samples = []
    for talk in TALKS:
        samples += template.samples(tuple(Message(*turn) for turn in talk))
    packed = pack_samples([len(s.ids) for s in samples], SEQ_LEN + 1)
    assert len(packed) < len(samples)
    batches = {
        "packed": [[samples[i] for i in row] for row in packed],
        "unpacked": [[sample] for sample in samples],
    }
    expected, count, ids = theirs(config, model, tokenizer)
    assert [sample.ids.tolist() for sample in samples] == ids

    results = {}
    for name, rows in batches.items():
        batch = rows_to_batch([fill_row(row, SEQ_LEN) for row in rows], mask_documents=True)
        assert batch.loss_weights_BT.sum() == count  # the same tokens are learnt

        batch = jax.tree.map(jnp.asarray, batch)

        def loss(params, batch=batch):
            totals = Totals(batch.loss_weights_BT.sum(), jnp.int32(1))
            return pretrain_loss(DeepSeekV3(config, FLOAT32), params, bias, batch, totals, None)[0]

        compiled = jax.jit(jax.value_and_grad(loss))
        results[name] = compiled(params)
    for parameter in model.parameters():
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    reference, _ = our_params(config, model, tmp_path / "gradients")

    np.testing.assert_allclose(results["packed"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(results["packed"][0], results["unpacked"][0], rtol=2e-6)
    leaves = zip(
        jax.tree.leaves_with_path(results["packed"][1]),
        jax.tree.leaves(results["unpacked"][1]),
        jax.tree.leaves(reference),
        strict=True,
    )
    for (path, ours), unpacked, torchs in leaves:
        scale = np.abs(torchs).max()
        np.testing.assert_allclose(ours, torchs, rtol=0, atol=1e-4 * scale, err_msg=str(path))
        np.testing.assert_allclose(ours, unpacked, rtol=0, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.slow
def test_what_was_learnt_is_what_transformers_says(tmp_path):
    """Trained here, exported, opened there: ``apply_chat_template`` and greedy give our text."""
    from deepseek_jax.convert import convert_to_hf
    from deepseek_jax.data.sft import ConversationConfig
    from deepseek_jax.train.loop import LoopConfig
    from deepseek_jax.train.optim import OptimConfig
    from deepseek_jax.train.sft import SftConfig, sft
    from tests.train import runs

    base = runs.write_base(tmp_path / "base")
    answers = {"Why?": "Because.", "How?": "Slowly."}
    lines = [
        json.dumps({"prompt": ask, "completion": say, "n": i})
        for i in range(8)
        for ask, say in answers.items()
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    data = str(tmp_path / "talks.jsonl")
    out = tmp_path / "sft"
    result = sft(
        SftConfig(
            out=out,
            init=base,
            precision=FLOAT32,
            mesh=f"data={len(jax.devices())}",
            epochs=None,
            conversations=ConversationConfig(data=(data,), held_out=(data,), seq_len=64),
            loop=LoopConfig(steps=60, batch_size=8, eval_every=0, save_every=100),
            optim=OptimConfig(peak_lr=2e-2, min_lr=1e-3, final_lr=1e-3, warmup_steps=0),
            samples=1,
            sample_tokens=16,
        )
    )
    assert result is not None
    convert_to_hf(out, tmp_path / "hf", dtype="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    from deepseek_jax.checkpoint import load_params
    from deepseek_jax.data.tokenizer import Tokenizer
    from deepseek_jax.generate import Sampling, complete

    params, bias, _ = load_params(out)
    ours = Tokenizer.load(out)
    template = ChatTemplate.load(out, ours)
    for ask, say in answers.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        ids = template.prompt_ids([Message("user", ask)])
        assert prompt[0].tolist() == ids
        with torch.no_grad():
            found = model.generate(prompt, do_sample=False, max_new_tokens=16)
        text = tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
        model_here = DeepSeekV3(runs.MODEL, FLOAT32)
        greedy = Sampling(16, temperature=0.0)
        assert complete(model_here, params, bias, ours, [ids], greedy) == [text] == [say]
