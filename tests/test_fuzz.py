"""Random settings and command lines: whatever is written, a command answers in words, soon, and never with a traceback."""

import contextlib
import random
import signal
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hpt import recipe
from megatron_hpt.config import Config
from megatron_hpt.errors import HptError
from megatron_hpt.launch import settings_checks
from megatron_hpt.overrides import apply_overrides, dump_yaml, validated
from megatron_hpt.settings.sections import alternatives, annotation_of, is_section
from megatron_hpt.settings.values import parse
from tests import programs

ROOT = Path(__file__).parents[1]
SEED = 16
HANG_S = 10
# fmt: off
TEXTS = [
    '0', '1', '-1', '2', '3', '7', '1e3', '1e-3', '1e400', '-1e400', '.inf', '-.inf', '.nan', 'nan', 'inf', '1000000000',
    '99999999999999999999', '010', '0x1F', '0o17', '1_000', '1:30', '0.5', '1.0', '1.5', 'true', 'false', 'yes', 'no', 'on',
    'off', 'null', '~', 'Null', 'None', '""', "''", '"a"', "'a'", 'a', 'a,b', 'a.b', 'a/b', '../x', '/', '.', '..', '~/x',
    '$HOME', 'é', '\u6570', '[', ']', '[]', '{}', '[1]', '[1,2]', '[0.9,0.95]', '[a,b]', '[[[]]]', '{a:1}', '{a}', '[1', '#x',
    'x#y', '&a', '*a', '!!str', '!!python/object:os.system', '---', '...', '%YAML', '|', '>', '|-', '-', '?', ':', 'a:', ':a',
    '`x`', '@x', '!x', '<<', '2020-01-01', 'math', 'hpt', 'grpo', 'vllm', 'module:function', 'file.py:function', 'http://x:1',
    's3://b/k', '1,000', '+5', '-0', '0b1', '(?s).*\\\\boxed\\\\{.*', '(', '[a-z', '**', '{{x}}', '{%', '\\\\',
    '9999999999999999', '[.nan,1]', '[-1,1]', '["]', '\udcff', '\x00', '\x1b[31m', '\t', '\n', '{a: 1}', '{a: b, a: c}',
    '{1: 2}', '[a: b]', '{a: {b: {c: d}}}', '{math: 0.9}', '{math: .nan}', '{path: x}', '{steps: 3}', '{tensor: 2}',
    '[{path: a, weight: 1}]',
]
# fmt: on
LONG = [
    "[" * 3000,
    "{a: " * 1000,
    "9" * 5000,
    "x" * 5000,
    "(" * 500,
    "a b # c",
    " 3",
    "3 ",
    "3 # x",
    "a\nb: c",
    "(?s).* #### \\d+",
]
VALUES = [*TEXTS, *LONG]


def paths() -> list[str]:
    """Every setting's key, sections included."""

    def below(kind: type, path: list[str]) -> Iterator[str]:
        for name in kind.model_fields:
            yield ".".join([*path, name])
            annotation = annotation_of(Config, [*path, name])
            for each in alternatives(annotation):
                if is_section(each):
                    yield from below(each, [*path, name])
                elif typing.get_origin(each) is dict:
                    yield ".".join([*path, name, "own"])

    return sorted(set(below(Config, [])))


KEYS = [
    *paths(),
    "algorithm.gate.by_source.own.threshold",
    "reward.by_source.own.math",
    "trainer.stepz",
    "",
    ".",
    "a..b",
    "steps",
]


def override(draws: random.Random) -> str:
    """One setting: a key that mostly exists, a value that mostly means nothing for it."""
    text = (
        draws.choice(VALUES)
        if draws.random() < 0.9
        else "".join(draws.choices("[]{}:,#&*!|>'\"%@` ab1.-\n\\", k=draws.randint(1, 12)))
    )
    return draws.choice(KEYS) + draws.choice(["=", "=", "=", "=", "=", "=", "=", "==", ""]) + text


@contextlib.contextmanager
def no_hang(what: object, seconds: float = HANG_S) -> Iterator[None]:
    """A test fails where something takes longer than a user waits."""

    def late(*_: object) -> None:
        raise AssertionError(f"hangs: {what!r}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def settings_are_read(number: int, seed: int) -> int:
    """How many of so many random settings are accepted; all others are refused in words."""
    draws, base, accepted = random.Random(seed), recipe.load(str(ROOT / "recipes" / "quickstart.py"), []).config, 0
    for _ in range(number):
        given = [override(draws) for _ in range(draws.choice([1, 1, 2]))]
        with no_hang(given):
            refusal = _refusal(base, given)
        accepted += refusal is None
        if refusal is not None:
            assert 0 < len(refusal.strip()) < 4000 + 3 * sum(map(len, given)), given
            assert "function-" not in refusal, given  # pydantic's name for a part of ours
    return accepted


def _refusal(base: Config, given: list[str]) -> str | None:
    try:
        config = apply_overrides(base, given)
        settings_checks.check(config)
    except HptError as error:
        return str(error)
    assert validated(parse(dump_yaml(config)), "saved") == config, given
    return None


COMMANDS: dict[str, Callable[[random.Random, list[str]], list[str]]] = {
    "config": lambda draws, words: [draws.choice(words), override(draws)],
    "plan": lambda draws, words: [
        draws.choice(words),
        override(draws),
        "--cluster",
        draws.choice(words),
        "--fill",
        draws.choice(VALUES),
    ],
    "algorithms": lambda draws, words: [draws.choice([*words, "hpt", "grpo"]), override(draws).replace("algorithm.", "")],
    "report": lambda draws, words: [draws.choice(words), "--out", draws.choice(words)],
    "compare": lambda draws, words: [*draws.choices(words, k=2), "--output", draws.choice([*words, "x.md", "x.png"])],
    "regrade": lambda draws, words: [draws.choice(words), "--grader", draws.choice(VALUES), "--workers", draws.choice(VALUES)],
    "replay": lambda draws, words: [draws.choice(words), "--gate", override(draws).removeprefix("algorithm.gate.")],
    "evaluate": lambda draws, words: [
        draws.choice(words),
        "--benchmarks",
        draws.choice(VALUES),
        "--temperature",
        draws.choice(VALUES),
    ],
    "train": lambda draws, words: [draws.choice(words), "model.path=nowhere", override(draws)],
    "check": lambda draws, words: [draws.choice(words), "model.path=nowhere", override(draws)],
    "slurm": lambda draws, words: [draws.choice(words), "--dry-run", "--ranks-per-node", draws.choice(VALUES), override(draws)],
    "launch": lambda draws, words: [draws.choice(words), "--dry-run", "--site", draws.choice(words), override(draws)],
    "nonsense": lambda draws, words: draws.choices([*words, *VALUES], k=3),
}
TOOLS: dict[str, Callable[[random.Random, list[str]], list[str]]] = {
    "grade.py": lambda draws, words: [draws.choice(words), "--deadline-s", draws.choice(VALUES), "--out", draws.choice(words)],
    "prepare_data.py": lambda draws, words: [
        "columns",
        *draws.choices(words, k=2),
        draws.choice(["prompt=a", "answer=b", *VALUES]),
    ],
    "convert_hf.py": lambda draws, words: [
        draws.choice(["to-megatron", "to-hf", "verify", "show"]),
        *draws.choices(words, k=2),
    ],
    "check_vectors.py": lambda draws, words: [draws.choice(words), "--grader", draws.choice(words)],
    "weight_transfer.py": lambda draws, words: [
        "plan",
        draws.choice(words),
        "--actor",
        draws.choice(VALUES),
        "--engines",
        draws.choice(VALUES),
    ],
}


def hostile_words(folder: Path) -> list[str]:
    """Names of files and folders of all kinds, good ones among them."""
    (folder / "folder.md").mkdir()
    (folder / "empty").mkdir()
    (folder / "file.jsonl").write_text('{"response": "A", "ground_truth": "B"}\n', encoding="utf-8")
    (folder / "bytes.parquet").write_bytes(bytes(range(256)))
    (folder / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (folder / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    (folder / "twice.yaml").write_text("name: a\nname: b\n", encoding="utf-8")
    (folder / "raises.py").write_text("raise SystemError('x')\n", encoding="utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling.md").symlink_to(folder / "nowhere")
    for name, contents in (("config.yaml", "- 1"), ("evaluation.json", "[]"), ("metrics.jsonl", "{")):
        (folder / "empty" / name).write_text(contents, encoding="utf-8")
    good = [str(ROOT / "recipes" / "quickstart.py"), str(ROOT / "recipes" / "clusters" / "h100x8.yaml")]
    own = [path.name for path in folder.iterdir()]
    return [
        *own,
        *good,
        *good,
        "n" * 300,
        "",
        ".",
        "/",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "http://127.0.0.1:1",
        "a=b",
        "-",
        "--x",
    ]


def commands_answer(number: int, seed: int, folder: Path) -> None:
    """Random command lines end with an exit code and in words."""
    draws, words = random.Random(seed), hostile_words(folder)
    programs_ = [
        *((name, programs.megatron_hpt, make) for name, make in COMMANDS.items()),
        *((n, programs.tool, m) for n, m in TOOLS.items()),
    ]
    for place in range(number):
        name, program, make = programs_[place % len(programs_)]
        arguments = [each.replace("\x00", "") for each in make(draws, words)]  # a shell passes none
        with no_hang([name, *arguments], HANG_S if place >= len(programs_) else 6 * HANG_S):  # the first ones import
            done = program(name, *arguments, cwd=folder)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, (name, arguments, said[-2000:])
        assert done.returncode in (0, 1, 2), (name, arguments, said[-2000:])
        assert done.returncode == 0 or done.stderr.strip(), (name, arguments)


def test_settings() -> None:
    assert settings_are_read(100, SEED) > 5


def test_command_lines(tmp_path: Path) -> None:
    commands_answer(2 * (len(COMMANDS) + len(TOOLS)), SEED, tmp_path)


@pytest.mark.thorough
@pytest.mark.slow
def test_many_settings() -> None:
    """500 settings in place of 100."""
    assert settings_are_read(500, SEED + 1) > 25


@pytest.mark.thorough
@pytest.mark.slow
def test_many_command_lines(tmp_path: Path) -> None:
    """200 command lines in place of 36."""
    commands_answer(200, SEED + 1, tmp_path)
