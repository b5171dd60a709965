"""Text in and out: stop strings that begin and end within tokens, and the end of a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax import UserError
from deepseek_jax.generate import Completion, Sampling, completion_text, text_request


class Pieces:
    """Ids are pieces of text of several lengths; 0 begins, 1 ends a sequence."""

    bos_id, eos_id = 0, 1
    pieces = ("<s>", "</s>", "a", "b", "ab", "ba", "\n", "aba")

    def encode(self, text):
        return [self.pieces.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


TOKENIZER = Pieces()


def completion(tokens):
    return Completion(0, 0, tokens, "stop", *[np.zeros(len(tokens))] * 2, None, None, np.zeros(1))


@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=20),
    st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=2),
)
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(tokens, stop):
    request = text_request(TOKENIZER, "ab", Sampling(), stop=stop)
    keep, text = request.stopped(tokens), TOKENIZER.decode(tokens)
    if not any(string in text for string in stop):
        assert keep is None
        assert completion_text(TOKENIZER, completion(tokens), stop) == text
        return
    kept, before = TOKENIZER.decode(tokens[:keep]), TOKENIZER.decode(tokens[: keep - 1])
    assert any(string in kept for string in stop)
    assert not any(string in before for string in stop)
    said = completion_text(TOKENIZER, completion(tokens[:keep]), stop)
    assert kept.startswith(said)
    assert not any(string in said for string in stop)


def test_prompts_in_text_begin_a_sequence_and_those_in_ids_are_as_they_are():
    assert text_request(TOKENIZER, "ab", Sampling()).prompt == [0, 2, 3]
    assert text_request(TOKENIZER, [5, 6], Sampling()).prompt == [5, 6]
    assert text_request(TOKENIZER, "ab", Sampling()).stop_tokens == [1]


def test_the_end_of_a_sequence_is_no_text():
    assert completion_text(TOKENIZER, completion([2, 6, 1])) == "a\n"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        text_request(TOKENIZER, "ab", Sampling(), stop=["b", ""])
