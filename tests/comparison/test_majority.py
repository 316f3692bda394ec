"""maj@k against the enumeration of all subsets; which answers are equal."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.comparison import majority
from megatron_hpt.comparison.majority import Votes, majority_at_k, normal_form, votes

SAMPLE = st.sampled_from([("1", 1.0), ("2", 0.0), ("3", 0.0), ("2", 1.0), (None, 0.0)])


def of_subset(subset: tuple) -> float:
    """The definition, for one subset; shares are those of all samples with that answer."""
    counts = Counter(answer for answer, _ in subset if answer is not None)
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    return float(np.mean([dict(subset)[answer] for answer in tied])) if tied else 0.0


@settings(max_examples=150)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=9))
def test_majority_is_the_mean_over_all_subsets(samples: list) -> None:
    counted = votes([answer for answer, _ in samples], [score for _, score in samples])
    shares = {answer: np.mean([s for a, s in samples if a == answer]) for answer, _ in samples}
    labelled = [(answer, float(shares[answer])) for answer, _ in samples]
    ks = range(1, len(samples) + 1)
    expected = [np.mean([of_subset(subset) for subset in itertools.combinations(labelled, k)]) for k in ks]
    assert majority_at_k(counted, ks) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=40), data=st.data())
def test_one_k_is_what_it_is_among_all(samples: list, data: st.DataObject) -> None:
    counted = votes([answer for answer, _ in samples], [score for _, score in samples])
    k = data.draw(st.integers(1, len(samples)))
    assert majority_at_k(counted, [k]) == pytest.approx([majority_at_k(counted, range(1, len(samples) + 1))[k - 1]], abs=1e-12)


def test_by_hand() -> None:
    """Three right, three wrong alike, one other: a tie of two at k = n."""
    counted = votes(["1", "1", "1", "2", "2", "2", "9"], [1.0] * 3 + [0.0] * 4)
    assert counted == Votes((3, 3, 1), (1.0, 0.0, 0.0))
    assert majority_at_k(counted, [1, 7]) == pytest.approx([3 / 7, 0.5])
    assert majority_at_k(votes([None, None], [0.0, 0.0]), [1, 2]) == [0.0, 0.0]


def test_ungraded_samples_have_no_vote() -> None:
    assert votes(["1", "1", None, "2"], [1.0, None, None, 0.0]) == Votes((1, 1), (1.0, 0.0))


def test_k_beyond_the_graded_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="of 2 samples"):
        majority_at_k(Votes((2,), (1.0,)), [4])


def test_many_samples_are_drawn_reproducibly_and_near_the_exact_value(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Votes((20, 18, 10, 5, 1, 1), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), abstained=5)
    ks = [1, 2, 8, 32, 60]
    exact = majority_at_k(counted, ks)
    monkeypatch.setattr(majority, "EXACT_UP_TO", 8)
    drawn = majority_at_k(counted, ks)
    assert drawn == majority_at_k(counted, ks)
    assert drawn == pytest.approx(exact, abs=4 * 0.5 / majority.DRAWS**0.5)
    assert drawn[-1] == exact[-1] == 1.0


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        ("0.50", r"\frac{1}{2}"),
        ("-3/6", "-.5"),
        ("1,000", "1000"),
        (r"$\text{(A)}$", "(A)"),
        (r"2\,\sqrt{3}", r"2\sqrt{3}."),
    ],
)
def test_the_same_answer_written_otherwise(answer: str, same: str) -> None:
    assert normal_form(answer) == normal_form(same)


@pytest.mark.parametrize(("answer", "other"), [("1,2", "12"), ("x", "X"), ("1/0", "0"), (r"\leftarrow", "arrow"), ("3", "-3")])
def test_other_answers_stay_others(answer: str, other: str) -> None:
    assert normal_form(answer) != normal_form(other)


@given(answer=st.text(alphabet="0123456789-+/.,\\ {}fracdt$", max_size=30) | st.text())
def test_any_text_has_a_normal_form_which_is_its_own(answer: str) -> None:
    assert isinstance(normal_form(answer), str)


def test_hostile_answers_cost_nothing() -> None:
    for answer in ("9" * 1_000_000, "9" * 5000 + "/3", "{" * 100_000, "1e999999999", r"\text{" * 20_000):
        assert len(normal_form(answer)) <= len(answer)
