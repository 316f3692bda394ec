"""Prompts by position: interrupted anywhere, a run takes what it would have taken; the curriculum; the files of a run."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.batch.history import History
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch
from megatron_hpt.config import Config, CurriculumConfig, DataConfig, ModelConfig, RolloutConfig, SourceConfig, TrainerConfig
from megatron_hpt.data.curriculum import Curriculum, advance
from megatron_hpt.data.source import check_same_files, files, open_sets, training_source
from megatron_hpt.data.storage import fingerprint
from megatron_hpt.data.storage.fingerprint import PIECE_BYTES, offsets
from megatron_hpt.data.storage.locations import find
from megatron_hpt.errors import DataError

from .problems import row, write

LONG = [{"role": "user", "content": "1+" * 30}]
LONG_TARGET = [{"role": "assistant", "content": "1+" * 60}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files; every seventh prompt and every fifth demonstration of the first is too long."""
    folder = tmp_path_factory.mktemp("data")
    for part, first in enumerate((0, 30, 41)):
        rows = [
            row(
                number,
                **({"prompt": LONG} if number % 7 == 0 else {}),
                **({"target": LONG_TARGET} if number % 5 == 0 else {}),
                **({"target_lst": [f"{number}+{other}" for other in range(4)]} if number % 3 == 0 else {"target_lst": None}),
            )
            for number in range(first, (30, 41, 60)[part])
        ]
        write(folder / f"{part}.parquet", rows, group=4)
    return folder


def config_of(data: Path, mixed: bool, curriculum: CurriculumConfig | None = None, **changes) -> Config:
    train = [
        SourceConfig(path=[f"{data}/0.parquet", f"{data}/1.parquet"], weight=3),
        SourceConfig(path=f"{data}/2.parquet", weight=1),
    ]
    settings = {"max_prompt_length": 16, "max_response_length": 32, "curriculum": curriculum or CurriculumConfig(), **changes}
    return Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train=train if mixed else str(data), **settings),
        rollout=RolloutConfig(cancel_decided=False),
        trainer=TrainerConfig(seed=5),
    )


class Run:
    """What the coordinator does with its data: takes prompts, decides, writes the ledger, remembers by it."""

    def __init__(self, config: Config, tokenizer, ledger: Ledger, start: int) -> None:
        self._source = training_source(config, open_sets(config), tokenizer)
        self._ledger, self._history = ledger, History(ledger, start)

    def step(self, step: int, sizes: list[int]) -> list:
        """One step, of several rounds; prompts of odd numbers are always solved, those divisible by 4 never."""
        position, prompts, counts = self._history.next_prompt, [], Counter()
        for size in sizes:
            taken = self._source.take(position, size, self._history.streaks)
            position = taken.next_position
            prompts += taken.prompts
            counts.update(taken.counts)
        metrics = {"data/next_prompt": position, **{f"data/{name}": number for name, number in counts.items()}}
        self._ledger.write(Batch(step, [], [decision(prompt.prompt_id) for prompt in prompts], metrics))
        self._history.add(step)
        return [prompts, metrics]


def decision(prompt_id: str, solved: int | None = None, graded: int = 4, cancelled: int = 0) -> dict:
    number = int(prompt_id.lstrip("p"))
    solved = (4 if number % 2 else 0 if number % 4 == 0 else 2) if solved is None else solved
    return {"prompt_id": prompt_id, "choice": "rollouts", "solved": solved, "graded": graded, "cancelled": cancelled}


CURRICULA = st.none() | st.builds(
    CurriculumConfig,
    visits=st.integers(1, 2),
    keep_solved=st.sampled_from([0.0, 0.5, 1.0]),
    keep_failed=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=2), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 5)),
    mixed=st.booleans(),
    curriculum=CURRICULA,
)
def test_a_run_that_is_interrupted_anywhere_takes_the_same(
    data: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory, sizes, cuts, mixed, curriculum
) -> None:
    config = config_of(data, mixed, curriculum)
    whole = Run(config, tokenizer, Ledger(tmp_path_factory.mktemp("whole")), 0)
    expected = [whole.step(step, of_step) for step, of_step in enumerate(sizes)]
    ledger = Ledger(tmp_path_factory.mktemp("cut"))
    for step, of_step in enumerate(sizes):
        if step == 0 or step in cuts:
            run = Run(config, tokenizer, ledger, step)
        assert run.step(step, of_step) == expected[step]


def test_an_epoch_of_one_source_has_every_prompt_that_fits_once(data: Path, tokenizer) -> None:
    config = config_of(data, mixed=False)
    source = training_source(config, open_sets(config), tokenizer)
    fitting = [number for number in range(60) if number % 7]
    epochs = [source.take(60 * epoch, len(fitting)) for epoch in range(2)]
    for taken in epochs:
        assert sorted(prompt.prompt_id for prompt in taken.prompts) == sorted(f"p{number}" for number in fitting)
        without = [number for number in fitting if number % 5 == 0 and number % 3]
        assert taken.counts["dropped_demonstrations"] == len(without)
        assert {prompt.prompt_id for prompt in taken.prompts if prompt.demonstration is None} == {f"p{n}" for n in without}
    assert [p.prompt_id for p in epochs[0].prompts] != [p.prompt_id for p in epochs[1].prompts]
    assert source.take(0, 2 * len(fitting)).counts["dropped_prompts"] in (17, 18)  # the last rows of an epoch may be long ones


def test_another_of_several_demonstrations_may_be_chosen_at_each_visit(data: Path, tokenizer) -> None:
    config = config_of(data, mixed=False)
    source = training_source(config, open_sets(config), tokenizer)
    seen: dict[str, set[str]] = {}
    for prompt in source.take(0, 51 * 30).prompts:
        if int(prompt.prompt_id[1:]) % 3 == 0:
            seen.setdefault(prompt.prompt_id, set()).add(tokenizer.decode(prompt.demonstration))
    for prompt_id, texts in seen.items():
        assert texts == {f"{prompt_id[1:]}+{other}<eos>" for other in range(4)}


def test_sources_give_their_shares_and_go_through_their_own_epochs(data: Path, tokenizer) -> None:
    config = config_of(data, mixed=True)
    source = training_source(config, open_sets(config), tokenizer)
    numbers = [int(prompt.prompt_id[1:]) for prompt in source.take(0, 2000).prompts]
    second = [number for number in numbers if number >= 41]
    fits = {True: 16 / 19, False: 34 / 41}  # of the rows of each source: three of four positions are the first's
    assert len(second) / 2000 == pytest.approx(fits[True] / (fits[True] + 3 * fits[False]), abs=0.03)
    assert len(Counter(second)) == 16
    assert max(Counter(second).values()) - min(Counter(second).values()) <= 1


def test_over_long_rows_are_refused_where_the_settings_say_so(data: Path, tokenizer) -> None:
    for setting, message in (
        ("long_prompts", r"parquet, row \d+, prompt: 61 tokens; data\.max_prompt_length allows 16"),
        ("long_demonstrations", r"row \d+, target: 121 tokens with end-of-sequence; data\.max_response_length allows 32"),
    ):
        config = config_of(data, mixed=False, **{setting: "refuse"})
        with pytest.raises(DataError, match=message):
            training_source(config, open_sets(config), tokenizer).take(0, 60)


def test_a_cut_demonstration_has_the_limits_length_and_no_end(data: Path, tokenizer) -> None:
    config = config_of(data, mixed=False, long_demonstrations="cut")
    taken = training_source(config, open_sets(config), tokenizer).take(0, 51)
    cut = [prompt for prompt in taken.prompts if len(prompt.demonstration) == 32]
    assert taken.counts["cut_demonstrations"] == len(cut) > 0
    assert tokenizer.decode(cut[0].demonstration) == "1+" * 16
    assert not taken.counts["dropped_demonstrations"]


def test_data_with_nothing_to_take_ends_with_an_error(data: Path, tokenizer) -> None:
    config = config_of(data, mixed=False, max_prompt_length=1)
    with pytest.raises(DataError, match=r"no prompt is left of a whole epoch \(dropped prompts: \d+\)"):
        training_source(config, open_sets(config), tokenizer).take(0, 1)
    all_solved = {f"p{number}": 3 for number in range(60)}
    dropped = config_of(data, mixed=False, curriculum=CurriculumConfig(keep_solved=0))
    with pytest.raises(DataError, match=r"no prompt is left .*passed solved: 60"):
        training_source(dropped, open_sets(dropped), tokenizer).take(0, 1, all_solved)
    rarely = config_of(data, mixed=False, curriculum=CurriculumConfig(keep_solved=0.001))
    taken = training_source(rarely, open_sets(rarely), tokenizer).take(0, 2, all_solved)
    assert len(taken.prompts) == 2
    assert taken.next_position > 60


def test_a_share_of_the_turns_is_kept() -> None:
    curriculum = Curriculum(visits=2, keep_solved=0.25, keep_failed=0, seed=1)
    assert [curriculum.passes(streak, 0) for streak in (0, 1, -1)] == [None] * 3
    assert {curriculum.passes(-2, position) for position in range(100)} == {"failed"}
    kept = [curriculum.passes(3, position) for position in range(4000)]
    assert kept.count(None) / 4000 == pytest.approx(0.25, abs=0.03)
    assert set(kept) == {None, "solved"}


@pytest.mark.parametrize(
    ("visits", "streak"),
    [
        ([(4, 4), (4, 4)], 2),
        ([(0, 4), (0, 3), (0, 1)], -3),
        ([(4, 4), (3, 4)], 0),
        ([(4, 4), (0, 4)], -1),
        ([(0, 4), (4, 4)], 1),
        ([(4, 4), (0, 0), (4, 4)], 2),  # nothing was graded
        ([(0, 4), (0, 2, 2)], 0),  # the rest was cancelled
    ],
)
def test_a_streak_is_of_visits_in_a_row(visits: list[tuple[int, ...]], streak: int) -> None:
    streaks: dict[str, int] = {}
    for visit in visits:
        advance(streaks, [decision("p1", *visit)])
    assert streaks.get("p1", 0) == streak


def test_a_solved_prompt_comes_back_when_it_is_failed_again(data: Path, tokenizer) -> None:
    """Passed over while its streak lasts; a kept turn can end it."""
    config = config_of(data, mixed=False, curriculum=CurriculumConfig(visits=1, keep_solved=0.5))
    source, streaks = training_source(config, open_sets(config), tokenizer), {"p1": 1}
    first = Counter(prompt.prompt_id for prompt in source.take(0, 51 * 12, streaks).prompts)
    advance(streaks, [decision("p1", 1)])
    second = Counter(prompt.prompt_id for prompt in source.take(0, 51 * 12, streaks).prompts)
    assert first["p1"] < 0.8 * first["p2"]
    assert second["p1"] in (second["p2"] - 1, second["p2"], second["p2"] + 1)


def test_a_run_goes_on_with_the_files_it_began_with(data: Path, tmp_path: Path) -> None:
    config = config_of(data, mixed=True)
    before = files(config)
    assert [each["rows"] for each in before] == [30, 11, 19]
    check_same_files(before, config)
    changed = [dict(before[0], rows=29), *before[1:]]
    with pytest.raises(DataError, match=r"0\.parquet: 29 rows when the run started, 30 rows now; .* without --resume"):
        check_same_files(changed, config)
    with pytest.raises(DataError, match=r"2\.parquet: not there when the run started, 19 rows now"):
        check_same_files(before[:-1], config)


def test_a_file_that_was_swapped_for_one_of_as_many_rows_is_noticed(tmp_path: Path) -> None:
    """Whatever was changed of it: also a byte, also where the size stays."""
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(5))
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    config = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train=str(path)))
    before = files(config)
    path.write_text(lines.replace('"ground_truth": "3"', '"ground_truth": "9"'))
    with pytest.raises(DataError, match=r"a\.jsonl: as many rows as when the run started, but other contents .* --resume"):
        check_same_files(before, config)
    check_same_files([{"file": each["file"], "rows": each["rows"]} for each in before], config)  # of an older run
    path.write_text(lines)
    check_same_files(before, config)


@given(size=st.integers(0, 50 * PIECE_BYTES), share=st.floats(0, 1))
def test_a_fingerprint_reads_both_ends_and_no_more_than_its_share(size: int, share: float) -> None:
    read = offsets(size, share)
    assert read == sorted(set(read))
    assert len(read) <= max(2, share * (size / PIECE_BYTES + 1))
    if size:
        assert read[0] == 0
        assert max(0, size - PIECE_BYTES) <= read[-1] < size
    if share == 1:
        assert read == list(range(0, size, PIECE_BYTES))


def test_of_large_files_pieces_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 100)
    monkeypatch.setattr(fingerprint, "READ_BYTES", 1000)
    path = tmp_path / "a"

    def checksum(content: bytes) -> str:
        path.write_bytes(content)
        return fingerprint.fingerprints(find(str(path)))[0]

    content = bytes(range(256)) * 40
    changed = [content[:place] + b"!" + content[place + 1 :] for place in (50, 4550, len(content) - 50, 200)]
    noticed = [checksum(each) != checksum(content) for each in changed]
    assert noticed == [True, True, True, False]
    assert checksum(content + b"!") != checksum(content)
