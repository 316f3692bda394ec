"""Shared words, equal texts and percentiles, beside their plain definitions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.preparation.checks import Seen
from megatron_hpt.preparation.overlap import PHRASE, SHORTEST, HeldOut, canonical, words
from megatron_hpt.preparation.summary import PERCENTILES, percentiles


def found(tests: list[str], prompts: list[str], length: int) -> list[set[int]]:
    """Test problems that each prompt shares words with; equal prompts are told apart from new ones."""
    held_out, seen = HeldOut(length), set()
    for row, text in enumerate(tests):
        held_out.add("set", row, text)
    hits = []
    for prompt in prompts:
        hits.append(held_out.hits(prompt, canonical(prompt) not in seen))
        seen.add(canonical(prompt))
    return [{match.row for match in held_out.matches(hit)} for hit in hits]


def by_definition(tests: list[str], prompts: list[str], length: int) -> list[set[int]]:
    def different(texts: list[str]) -> list[str]:
        return list({canonical(text): text for text in reversed(texts)}.values())

    def grams(text: str, size: int) -> set[tuple[str, ...]]:
        split = words(text)
        return {tuple(split[place : place + size]) for place in range(len(split) - size + 1)}

    shortest = min(SHORTEST, length)
    looked_for = {}
    for row, text in enumerate(tests):
        size = min(length, len(words(text)))
        looked_for[row] = grams(text, size) if size >= shortest else set()
    everything = set().union(*looked_for.values())
    sizes = range(length + 1)
    counts = Counter(
        gram for one in different(prompts) for gram in everything & {gram for size in sizes for gram in grams(one, size)}
    ) + Counter(gram for one in different(tests) for gram in grams(one, min(length, len(words(one)))) & everything)
    return [
        {
            row
            for row, text in enumerate(tests)
            if any(counts[gram] <= PHRASE and gram in grams(prompt, len(gram)) for gram in looked_for[row])
            or (not looked_for[row] and canonical(text) == canonical(prompt) and len(words(prompt)) < shortest)
        }
        for prompt in prompts
    ]


def texts(most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["one", "Two", "3", "+"]), max_size=most).map(" ".join)


@given(st.lists(texts(14), max_size=4), st.lists(texts(16), max_size=30), st.sampled_from([1, 2, 3, 8, 10, 13]))
def test_overlap_is_what_its_definition_says(tests: list[str], prompts: list[str], length: int) -> None:
    assert found(tests, prompts, length) == by_definition(tests, prompts, length)


@given(st.lists(st.lists(st.integers(0, 30).map(str), max_size=20), max_size=8))
def test_what_came_before_is_what_a_dictionary_says(batches: list[list[str]]) -> None:
    seen, first, number = Seen(), {}, 0
    for batch in batches:
        numbers = range(number, number + len(batch))
        expected = [first.setdefault(text, at) for text, at in zip(batch, numbers, strict=True)]
        assert seen.before(batch, numbers) == [None if e == at else e for e, at in zip(expected, numbers, strict=True)]
        number += len(batch)


@given(st.lists(st.integers(0, 50), min_size=1))
def test_percentiles_of_a_histogram_are_those_of_the_values(values: list[int]) -> None:
    expected = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    assert percentiles(Counter(values)) == expected


PROBLEM = "Let $ABC$ be a triangle with sides 13, 14 and 15, and let $D$ be the foot of its shortest altitude; find $AD$."


@pytest.mark.parametrize(
    ("prompt", "is_found"),
    [
        (PROBLEM, True),
        (PROBLEM.upper().replace("$", ""), True),
        (f"A warm-up first.\n{PROBLEM} Reason step by step.", True),
        (PROBLEM.replace("triangle", "polygon").replace("altitude", "height"), True),  # 13 words in a row are left
        (PROBLEM.replace("14", "40"), True),
        (PROBLEM.replace("triangle", "square").replace("15", "8").replace("foot", "end"), False),
        ("Let it be.", False),
    ],
)
def test_a_test_problem_is_found_within_a_prompt(prompt: str, is_found: bool) -> None:
    assert found([PROBLEM], [prompt], 13) == [{0} if is_found else set()]


def test_signs_tell_short_problems_apart() -> None:
    assert found(["What is 3 + 5?"], ["What is 3 - 5?", "What is 3+5?", "So: what is 3 + 5?"], 13) == [set(), {0}, set()]


def test_a_phrase_of_many_prompts_says_nothing_and_ten_copies_of_one_are_no_phrase() -> None:
    phrase = "Please reason step by step and put your final answer within a box of its own."
    prompts = [f"{number} plus {number}? {phrase}" for number in range(PHRASE + 5)]
    tests = [f"{PROBLEM} {phrase}"]
    assert found(tests, [*prompts, PROBLEM], 13) == [*[set()] * len(prompts), {0}]
    assert found(tests, [PROBLEM] * 40, 13) == [{0}] * 40


def test_chinese_is_compared_by_characters() -> None:
    problem = "已知三角形的三条边长分别为十三和十四以及十五求其面积"
    assert found([problem], [f"题目：{problem}。", "已知三角形的面积求边长"], 13) == [{0}, set()]
