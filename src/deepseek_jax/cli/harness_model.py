"""Our models as lm-evaluation-harness sees them (Gao et al., 2021); needs its package, lm-eval."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyrefly: ignore
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyrefly: ignore
from rich.progress import track

from deepseek_jax.cli.serving import Opened, ServingConfig
from deepseek_jax.data.conversations import Message
from deepseek_jax.generate import Sampling, completion_text, text_request
from deepseek_jax.train.logprobs import make_scorer
from deepseek_jax.train.loop import divide_batch
from deepseek_jax.types import Batch, Params, Rollout, UserError

# Rows are padded to a power of two of at least so many tokens: a program for each such length.
SHORTEST = 64


class HarnessModel(TemplateLM):
    """Log-likelihoods by the training forward pass, generation by the engine.

    Texts longer than the model's context lose their beginning, as with the harness's own models.

    Args:
        ready: The model. Its mesh must be set while this is used.
        config: Its options; ``max_length`` shortens the context, ``slots`` are rows at a time.
        chat: Prompts are conversations, in which special tokens are spelt out.
    """

    def __init__(self, ready: Opened, config: ServingConfig, *, chat: bool = False):
        super().__init__()
        self._ready, self._config, self._chat = ready, config, chat
        most = ready.model.config.max_position_embeddings
        self.max_length = min(config.max_length or most, most)
        self._rows = ready.rows(config)
        eos = ready.tokenizer.eos_id
        if eos is None:
            raise UserError("the tokenizer has no end-of-sequence token, which the harness needs.")
        self._eos: int = eos

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        bos = self._ready.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self._ready.folder)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids; with the begin-of-sequence token, unless the text or the caller says otherwise."""
        tokenizer = self._ready.tokenizer
        ids = tokenizer.encode(string, allow_special=self._chat)
        bos = tokenizer.bos_id
        if bos is None or add_special_tokens is False or self._chat:
            return ids
        return [bos, *ids]

    @functools.cached_property
    def _template(self) -> Any:
        return self._ready.template()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it."""
        if not add_generation_prompt:
            raise UserError("an answer that is begun already is not supported; use no prefill.")
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return self._template.prompt(messages)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source."""
        return self._template.source if chat_template else None

    # --- log-likelihoods ---------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation: log-probability, and whether greedy decoding would take it."""
        rows = [self._row(context, said) for _, context, said in requests]
        # The longest first, so that what does not fit in memory is noticed at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for start in track(
            range(0, len(order), self._rows), "log-likelihoods", disable=len(order) < 2
        ):
            some = order[start : start + self._rows]
            for i, result in zip(some, self._score([rows[i] for i in some]), strict=False):
                found[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return found

    def _row(self, context: list[int], said: list[int]) -> tuple[list[int], int]:
        """Ids of one row of at most ``max_length`` inputs, and how many of the last count."""
        if not context or not said:
            raise UserError("the harness asks about an empty text; leave that task out.")
        if len(said) > self.max_length:
            raise UserError(
                f"a continuation of {len(said)} tokens does not fit in {self.max_length}, which "
                "is what the model (or --max-length) has; leave that task out."
            )
        return (context + said)[-(self.max_length + 1) :], len(said)

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        longest = max(len(ids) for ids, _ in rows) - 1
        T = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.max_length)
        T = -(-T // self._ready.mesh.size) * self._ready.mesh.size
        ids_BT = np.zeros((self._rows, T + 1), np.int32)
        counts_BT, inside_BT = np.zeros((2, self._rows, T), np.int32)
        for row, (ids, last) in enumerate(rows):
            ids_BT[row, : len(ids)] = ids
            inside_BT[row, : len(ids) - 1] = 1
            counts_BT[row, len(ids) - 1 - last : len(ids) - 1] = 1
        batch = Batch(
            ids_BT[:, :-1],
            ids_BT[:, 1:],
            counts_BT.astype(np.float32),
            np.tile(np.arange(T, dtype=np.int32), (self._rows, 1)),
            inside_BT,
        )
        feed = divide_batch(self._rows, T, self._ready.mesh)
        rows_1BT = feed.place([feed.own(Rollout(batch, np.zeros(self._rows, np.float32)))])
        said = self._scorer(self._params, self._ready.router_bias_LE, rows_1BT)
        logp_BT, best_BT = (np.asarray(x[0]) for x in said)
        counts = counts_BT.astype(bool)
        greedy_BT = logp_BT >= best_BT
        return [
            (float(logp_BT[row][counts[row]].sum()), bool(greedy_BT[row][counts[row]].all()))
            for row in range(len(rows))
        ]

    @functools.cached_property
    def _params(self) -> Params:
        return self._ready.training_params()

    @functools.cached_property
    def _scorer(self) -> Any:
        return make_scorer(self._ready.model.clone(whole_rows=True), 1.0)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Of whole texts, each token with as much context as there is."""
        windows, owner = [], []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                context, said = make_disjoint_window(window)
                windows.append((None, context, said))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, found in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += found[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation --------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations up to a stop string, the stop string left out."""
        asked, stops = [], []
        for request in requests:
            context, options = request.args
            sampling, stop = self._sampling(options)
            ids = self.tok_encode(context)[-(self.max_length - sampling.max_new_tokens) :]
            asked.append(text_request(self._ready.tokenizer, ids, sampling, stop=stop))
            stops.append(stop)
        if not asked:
            return []
        engine = self._ready.engine(self._config, max(len(one.prompt) for one in asked))
        texts = [""] * len(asked)
        for done in track(engine.generate(asked), "generating", total=len(asked)):
            text = completion_text(self._ready.tokenizer, done, stops[done.request])
            texts[done.request] = text
            self.cache_hook.add_partial("generate_until", requests[done.request].args, text)
        return texts

    def _sampling(self, options: dict[str, Any]) -> tuple[Sampling, list[str]]:
        options = dict(options)
        until = options.pop("until", None) or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        new = int(options.pop("max_gen_toks", self._config.sampling.max_new_tokens))
        if new >= self.max_length:
            raise UserError(
                f"the task wants {new} new tokens, and the model (or --max-length) has "
                f"{self.max_length} in all; give the task max_gen_toks below that."
            )
        sampled = options.pop("do_sample", None)
        temperature = float(options.pop("temperature", 0.0 if not sampled else 1.0))
        if sampled is False:
            temperature = 0.0
        cut = {name: options.pop(name) for name in ("top_p", "top_k", "min_p") if name in options}
        if options:
            raise UserError(f"the task asks for {', '.join(options)}, which is not known here.")
        drawn: Any = {"top_p": 1.0, "seed": self._config.sampling.seed} | cut
        return Sampling(max_new_tokens=new, temperature=temperature, **drawn), stop
