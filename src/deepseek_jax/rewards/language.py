"""R1's language-consistency reward: the thinking stays in one language."""

import functools
import re
import unicodedata
from collections.abc import Iterator

from deepseek_jax.rewards.answers import split_thinking
from deepseek_jax.rewards.types import Completion
from deepseek_jax.types import UserError

# First words of the Unicode names of the letters that a language is written in.
_SCRIPTS = {
    "ar": {"ARABIC"},
    "de": {"LATIN"},
    "el": {"GREEK"},
    "en": {"LATIN"},
    "es": {"LATIN"},
    "fr": {"LATIN"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "th": {"THAI"},
    "zh": {"CJK"},
}
# Written without spaces: each character counts as a word.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}
# Neither formulas nor the names of variables are in a language.
_NOT_WORDS = re.compile(r"\\[A-Za-z]+|\$[^$\n]{1,500}\$")


def language_consistency(
    prompt: str, completion: Completion, reference: str, *, language: str
) -> float:
    """Words of the target language / all words of the thinking (R1 section 2.3.2).

    Languages are told apart by script: ``en`` against ``zh``, but not ``en`` against ``fr``.
    Words are runs of letters of one script, in scripts without spaces single characters; LaTeX
    and single Latin or Greek letters (variables) are not counted. 0 where there are no words.

    Raises:
        UserError: The language is not known.
    """
    if language not in _SCRIPTS:
        raise UserError(f"language {language!r} is not one of {', '.join(sorted(_SCRIPTS))}.")
    parts = split_thinking(prompt, completion.text)
    if parts is None:
        return 0.0
    scripts = list(_word_scripts(parts[0]))
    own = sum(script in _SCRIPTS[language] for script in scripts)
    return own / len(scripts) if scripts else 0.0


def _word_scripts(text: str) -> Iterator[str]:
    """The script of every word."""
    word, length = "", 0  # the script of the current run, and its letters
    for character in _NOT_WORDS.sub(" ", text) + " ":
        script = _script(character)
        if script == "MARK" and word:  # accents and vowel signs belong to the run
            continue
        if script != word:
            if word and (length > 1 or word not in ("LATIN", "GREEK")):
                yield word
            word, length = script, 0
        length += 1
        if script in _UNSPACED:
            yield script
            word, length = "", 0


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """First word of a letter's name, "MARK" of what modifies letters, "" of anything else."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "MARK"
    name = unicodedata.name(character, "?").replace("-", " ")  # KATAKANA-HIRAGANA PROLONGED ...
    return name.split()[0] if category[0] == "L" else ""
