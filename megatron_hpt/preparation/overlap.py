"""Training prompts that share text with test problems.

The rule of GPT-3 (arXiv 2005.14165, appendix C): a prompt is contaminated if it has n consecutive words in common with a test
problem, n = 13; a shorter test problem of at least 8 words is looked for whole. Words are without case and punctuation. What
more than 10 different problems have, training and test together, is a phrase ("where m and n are relatively prime positive
integers, find m + n") and says nothing. A test problem of fewer than 8 words counts where the whole prompt is equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WORDS = 13
SHORTEST = 8
PHRASE = 10

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")
Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Split text into runs of letters and digits, without case; each Chinese or Japanese character is a word of its own."""
    return _WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


def canonical(text: str) -> str:
    """Return the form in which equal prompts are equal texts: without white space, composed by Unicode's NFC."""
    return unicodedata.normalize("NFC", "".join(text.split()))


@dataclass(frozen=True)
class Match:
    """A test problem that a prompt shares words with."""

    test_set: str
    row: int
    words: str
    """The first words that are shared."""
    share: float
    """The share of the test problem's sequences that the prompt has."""


@dataclass(frozen=True)
class Hits:
    """What one prompt shares with test problems, before phrases are known."""

    grams: tuple[Gram, ...] = ()
    equal: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.grams or self.equal)


@dataclass
class HeldOut:
    """The word sequences of test problems."""

    length: int = WORDS
    """How many words a sequence has."""
    _places: list[tuple[str, int, int]] = field(default_factory=list)
    """For each problem its test set, its row and how many sequences it has."""
    _grams: dict[Gram, list[int]] = field(default_factory=dict)
    """Sequence → problems."""
    _starts: dict[Gram, set[int]] = field(default_factory=dict)
    """First words of a sequence → lengths of such sequences, so that one look at a place of a prompt serves all lengths."""
    _short: dict[str, list[int]] = field(default_factory=dict)
    _problems: Counter[Gram] = field(default_factory=Counter)
    """Sequence → how many different problems have it."""
    _texts: set[str] = field(default_factory=set)
    """Different test problems."""

    @property
    def shortest(self) -> int:
        """How many words the shortest problem has that is looked for within prompts."""
        return min(SHORTEST, self.length)

    @property
    def phrases(self) -> list[str]:
        """The sequences that turned out to be in more than 10 problems."""
        return [" ".join(gram) for gram in self._problems if self._phrase(gram)]

    def add(self, test_set: str, row: int, text: str) -> None:
        """Take up a test problem."""
        found = words(text)
        length = min(self.length, len(found))
        grams = set(_grams(found, length)) if length >= self.shortest else set()
        if not grams:
            self._short.setdefault(canonical(text), []).append(len(self._places))
        for gram in grams:
            self._grams.setdefault(gram, []).append(len(self._places))
            self._starts.setdefault(gram[: self.shortest], set()).add(length)
        if canonical(text) not in self._texts:
            self._problems.update(grams)
            self._texts.add(canonical(text))
        self._places.append((test_set, row, len(grams)))

    def hits(self, text: str, new: bool) -> Hits:
        """Return what a prompt shares with test problems.

        Args:
            new: no equal prompt came before; only new ones tell phrases.
        """
        found = words(text)
        equal = tuple(self._short.get(canonical(text), ())) if len(found) < self.shortest else ()
        if self._starts.keys().isdisjoint(_grams(found, self.shortest)):
            return Hits(equal=equal)
        grams = dict.fromkeys(
            gram
            for place, start in enumerate(_grams(found, self.shortest))
            for length in sorted(self._starts.get(start, ()))
            if (gram := tuple(found[place : place + length])) in self._grams
        )
        if new:
            self._problems.update(grams.keys())
        return Hits(tuple(gram for gram in grams if not self._phrase(gram)), equal)

    def matches(self, hits: Hits) -> list[Match]:
        """Return the test problems that hits mean, the largest share first. Called when all prompts were seen."""
        shared: dict[int, list[Gram]] = {problem: [] for problem in hits.equal}
        for gram in hits.grams:
            if not self._phrase(gram):
                for problem in self._grams[gram]:
                    shared.setdefault(problem, []).append(gram)
        return sorted((self._match(*one) for one in shared.items()), key=lambda match: -match.share)

    def _phrase(self, gram: Gram) -> bool:
        return self._problems[gram] > PHRASE

    def _match(self, problem: int, grams: Sequence[Gram]) -> Match:
        test_set, row, total = self._places[problem]
        return Match(test_set, row, " ".join(grams[0]) if grams else "", len(grams) / total if total else 1.0)


def _grams(found: Sequence[str], length: int) -> Iterable[Gram]:
    return zip(*(found[place:] for place in range(length)), strict=False)
