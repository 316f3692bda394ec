"""What is written on a command line or in a file is what counts: nothing is cut, guessed at or dropped."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt import config as configs
from megatron_hpt import recipe
from megatron_hpt.config import COUNTS_SOLVED, AlgorithmConfig, Config, DataConfig, ModelConfig, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.evaluation.grading import settings_of
from megatron_hpt.objective.algorithms import ALGORITHMS, build
from megatron_hpt.objective.gate import Informative, Soft, Switch
from megatron_hpt.overrides import apply_overrides, dump_yaml, load_yaml, note_twice, validated
from megatron_hpt.plan.assumptions import DEFAULT_CLUSTER
from megatron_hpt.plan.cluster import load_cluster
from megatron_hpt.rewards.grades import Grade
from megatron_hpt.rewards.pool import weighted, weights
from megatron_hpt.settings.values import dump, given_text, given_value, parse

BASE = Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), algorithm=AlgorithmConfig(name="grpo"))


def changed(*overrides: str) -> Config:
    return apply_overrides(BASE, list(overrides))


PATTERNS = [
    r"(?s).* #### \d+",
    "Answer:",
    "#.*",
    "&a .*",
    "*",
    "!x .*",
    "- .*",
    "? .*",
    "a: b",
    "---",
    "[ab]+.*",
    "{2}a",
    "%.*",
]


@pytest.mark.parametrize("pattern", [each for each in PATTERNS if each not in ("*", "? .*", "{2}a")])
def test_a_pattern_is_what_was_given(pattern: str) -> None:
    assert changed(f"reward.pattern={pattern}").reward.pattern == pattern


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: not text.strip().startswith(("'", '"'))))
def test_a_text_is_what_was_given_whatever_it_holds(text: str) -> None:
    assert changed(f"data.chat_template={text}").data.chat_template == (None if text.strip() in ("", "~", "null") else text)
    assert changed(f"model.path={text}").model.path == text
    assert validated(parse(dump_yaml(changed(f"model.path={text}"))), "saved").model.path == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [("'a # b'", "a # b"), ('"a\\n"', "a\n"), ("'it''s'", "it's"), ("'a' 'b'", "'a' 'b'"), ("'a' # b", "'a' # b"), ("'", "'")],
)
def test_quotes_around_all_of_a_text_are_yamls(text: str, meant: str) -> None:
    assert given_text(text) == meant


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("010", 10),  # YAML 1.1: 8
        ("1:30", "1:30"),  # 90
        ("no", "no"),  # false
        ("2020-01-01", "2020-01-01"),  # a date
        ("[a, b c]", ["a", "b c"]),
        ("{2: x, true: 1}", {"2": "x", "true": 1}),
        ("", None),
        ("'a # b'", "a # b"),
        ("[http://a:80, s3://b/*]", ["http://a:80", "s3://b/*"]),
    ],
)
def test_a_value_is_what_was_written(text: str, value: object) -> None:
    assert given_value(text) == value


CUT = [
    "3 # x",
    "[1, 2] # x",
    "&a 3",
    "*a",
    "!!str 3",
    "--- 3",
    "3:",
    "a: b",
    "- 3",
    "[a: b]",
    "{a:1}",
    "{a}",
    "a\nb",
    "|\n 3",
    "#",
]
BROKEN = [
    "[",
    "{a: 1, a: 2}",
    "{a: {b: 1, b: 1}}",
    "[" * 5000,
    "9" * 5000,
    "\x00",
    "\udcff",
    "[a #b, c]",
    "{[a]: b}",
    "%YAML 1.2",
]


@pytest.mark.parametrize("text", CUT)
def test_what_yaml_would_cut_is_refused_with_what_was_understood(text: str) -> None:
    for key in ("trainer.steps", "model.overrides.a"):
        with pytest.raises(ConfigError, match=f"{re.escape(key)}: .* (would be read as|is not a YAML value)"):
            changed(f"{key}={text}")


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_value_is_refused(text: str) -> None:
    for key in ("trainer.steps", "model.overrides.a", "evaluation.sets.a"):
        if key != "evaluation.sets.a" or text[0] in "[{":
            with pytest.raises(ConfigError, match=key) as caught:
                changed(f"{key}={text}")
            assert len(str(caught.value)) < 1000


def test_a_section_is_changed_where_a_mapping_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found = changed("trainer.seed=7", "trainer={steps: 3, save_every: 2}", "algorithm={gate: {threshold: 2}}")
    assert (found.trainer.steps, found.trainer.save_every, found.trainer.seed) == (3, 2, 7)
    assert found.trainer.export == BASE.trainer.export
    assert (found.algorithm.gate.threshold, found.algorithm.name) == (2, "grpo")
    assert not caplog.records
    by_source = changed("algorithm.gate.by_source.a={threshold: 2}", "algorithm.gate.by_source.a.off_policy_threshold=3")
    assert by_source.algorithm.gate.by_source["a"].threshold == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.steps=4", "trainer.steps=5"], "trainer.steps is given twice; trainer.steps=5 counts, being the last, and 4"),
        (
            ["trainer={steps: 6}", "trainer.steps=5"],
            "trainer.steps is given twice; trainer.steps=5 counts, being the last, and 6",
        ),
        (
            ["evaluation.sets.a=x", "evaluation.sets={b: y}"],
            "evaluation.sets.a is given twice; evaluation.sets={'b': 'y'} counts",
        ),
    ],
)
def test_of_a_key_given_twice_the_last_counts_and_a_note_says_so(
    caplog: pytest.LogCaptureFixture, overrides: list[str], said: str
) -> None:
    note_twice.cache_clear()
    with caplog.at_level(logging.WARNING):
        found, _ = changed(*overrides), changed(*overrides)
    assert found == changed(overrides[-1])
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


def test_an_argument_of_a_recipe_given_twice_likewise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "r.py").write_text(
        "from megatron_hpt.config import *\ndef recipe(size: str = '7B') -> Config:\n"
        "    return Config(name=size, model=ModelConfig(path='m'), data=DataConfig(train='t'))\n"
    )
    assert recipe.load(str(tmp_path / "r.py"), ["size=a", "size=b"]).config.name == "b"
    assert "size is given twice" in caplog.text


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(BASE) + "trainer: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: .*the key 'trainer' stands twice, line \d+"):
        load_yaml(file)
    file.write_text(DEFAULT_CLUSTER.read_text() + "nodes: 3\n")
    with pytest.raises(ConfigError, match="the key 'nodes' stands twice"):
        load_cluster(file)
    with pytest.raises(ConfigError, match="the key 'math' stands twice"):
        settings_of("{math: 0.5, math: 0.5}", RewardConfig())


def test_saved_texts_are_read_back_by_either_version_of_yaml() -> None:
    tree = {
        "a": ["1e-3", "no", "010", "2020-01-01", "1:30", "~", "", "<<", ".nan", "0o17", "0x1", "é #\n:"],
        "1": 1e-06,
        "null": None,
    }
    assert parse(dump(tree)) == tree == yaml.safe_load(dump(tree))
    assert repr(parse(dump(tree))) == repr(tree)


MEANINGLESS = """
optimizer.betas=[1.5, -2]
optimizer.betas=[0.9, 1]
optimizer.betas=[0.9, .nan]
optimizer.betas=[0.9]
optimizer.lr=.inf
optimizer.lr=.nan
optimizer.lr=1e400
optimizer.lr=-1e-6
optimizer.lr=2
optimizer.lr=true
optimizer.eps=.inf
optimizer.weight_decay=.inf
optimizer.clip_grad=.nan
optimizer.skip_above=.nan
optimizer.decay_to=1.5
optimizer.warmup_steps=-1
rollout.temperature=.inf
rollout.temperature=1e9
rollout.temperature=.nan
rollout.samples_per_prompt=100000000
rollout.servers=1000000000
rollout.gpu_memory_share=.nan
rollout.max_running=-1
evaluation.temperature=.inf
evaluation.top_p=.nan
evaluation.samples=10000000000
trainer.steps=true
trainer.steps=10000000000000
trainer.steps=1.5
trainer.prompts_per_step=1000000000
trainer.seed=-1
trainer.seed=99999999999999999999999
deadlines.step_s=.inf
deadlines.startup_s=1e12
reward.deadline_s=.inf
reward.deadline_s=-1
reward.memory_gib=.nan
reward.workers=1000000000
reward.tolerance=.nan
reward.tolerance=2
reward.code.time_s=.nan
reward.http.threshold=.nan
reward.name={math: .nan}
reward.name={math: .inf}
reward.name={}
reward.by_source={a: {math: .nan}}
data.max_prompt_length=1000000000
data.curriculum.keep_solved=.nan
evaluation.sets={a: ""}
data.train=[{path: a, weight: .nan}]
data.train=[{path: a, weight: .inf}]
data.train=[a, ""]
algorithm.gate.threshold=.nan
algorithm.gate.threshold=100000000
algorithm.gate.threshold=1.5
algorithm.gate.threshold=true
algorithm.gate.hysteresis=-1
algorithm.gate.rollout_schedule=[.nan, 1]
algorithm.gate.by_source.a.threshold=.inf
algorithm.clip.low=1.5
algorithm.clip.high=.nan
algorithm.clip.dual=.inf
algorithm.discount=.nan
algorithm.entropy.coefficient=.inf
algorithm.entropy.target=.nan
algorithm.kl.coefficient=.nan
algorithm.mismatch.high=.inf
algorithm.mismatch.stop_above=.nan
algorithm.overlong.penalty=.inf
algorithm.mixture.start=.nan
algorithm.srft.imitation=.inf
parallel.tensor=1000000000
parallel={tensor: 100000, data: 100000}
actor.threads=100000000
actor.micro_batch_tokens=0
transfer.compare_every=0
model.path=
model.overrides={rope_theta: .nan}
model.overrides.rope_theta=.inf
name=
name=..
name=a/b
name=a\x00b
deadlines.startup_s=1e-9
reward.deadline_s=1e-9
reward.memory_gib=1e-30
reward.name={math: 1e308, format: 1e308}
rollout.urls=[x]
rollout.urls=["http://a b"]
rollout.urls=["http://a:99999"]
rollout.host=a b
transfer.host=
evaluation.sets={"../x": a}
evaluation.sets={"": a}
evaluation.sets={a/b: a}
""".strip().splitlines()


@pytest.mark.parametrize("override", [*MEANINGLESS, "name=" + "n" * 300])
def test_a_value_that_can_mean_nothing_is_refused_by_its_key(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=re.escape(key)):
        changed(override)


def test_every_number_of_the_configuration_has_bounds() -> None:
    def numbers(section: type, path: str):
        for name, schema in section.model_json_schema()["properties"].items():
            yield f"{path}{name}", schema

    def leaves(schema: dict):
        yield schema
        for inner in [*schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("prefixItems", [])]:
            yield from leaves(inner)

    own = [kind for kind in vars(configs).values() if isinstance(kind, type) and issubclass(kind, configs.Section)]
    bound = {"maximum", "exclusiveMaximum", "le", "lt"}
    free = {"dual", "threshold", "off_policy_threshold", "hysteresis"}  # of functions of their own, or of a user's scores
    for kind in own:
        for name, schema in numbers(kind, ""):
            for leaf in leaves(schema):
                if leaf.get("type") in ("integer", "number") and name not in free:
                    assert bound & leaf.keys(), f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("{math: 0.9, format: 0.1}", True),
        ("{math: 0.7, format: 0.2, choice: 0.1}", True),
        ("{math: 1, format: 0.1}", True),
        ("{math: 1.1, format: -0.1}", True),
        ("{math: 0.9, format: 0.05}", False),
        ("{math: 0.9, format: 0.2}", False),
        ("{math: 2}", False),
        ("{math: 0}", False),
        ("{math: -1}", False),
        ("{math: 0.9, reasoning_gym: 0.2}", True),
        ("{math: 0.5, reasoning_gym: 0.2}", False),
        ("{math: 0.5, 'mine.py:score': 0.2}", True),
    ],
)
def test_a_sum_that_never_is_1_is_refused_where_a_gate_counts_ones(name: str, fits: bool) -> None:
    changed(f"reward.name={name}")  # grpo counts none
    for key in ("reward.name", "reward.by_source.a"):
        overrides = ["algorithm.name=hpt", f"{key}={name}"]
        if fits:
            changed(*overrides)
        else:
            with pytest.raises(ConfigError, match=rf"{re.escape(key)}: given .*; no answer can reach exactly 1"):
                changed(*overrides)


@given(
    st.dictionaries(st.sampled_from(["math", "format", "choice"]), st.integers(-20, 20).map(lambda n: n / 10), min_size=1),
    st.data(),
)
def test_a_sum_that_is_refused_is_never_1(choice: dict, data: st.DataObject) -> None:
    parts = {name: Grade(float(data.draw(st.booleans()))) for name in choice}
    if weighted(weights(choice), parts).score == 1.0:
        assert configs.may_be_one(choice, True)


def test_algorithms_whose_gate_counts_are_known() -> None:
    gates = {name: build(AlgorithmConfig(name=name, sft_steps=1), 10, 4).gate for name in ALGORITHMS}
    assert {name for name, gate in gates.items() if isinstance(gate, Switch | Soft | Informative)} == set(COUNTS_SOLVED)


def test_errors_name_keys_that_exist(tmp_path: Path) -> None:
    for override, message in {
        "reward.name={math: x}": r"reward\.name\.math: given 'x'; ",
        "reward.name={mat: 1}": r"reward\.name: given \{'mat': 1(\.0)?\}; allowed: .*did you mean 'math'",
        "algorithm.gate.rollout_schedule=[x]": r"algorithm\.gate\.rollout_schedule\.0: given 'x'",
        "algorithm.gate.threshold=x": r"algorithm\.gate\.threshold: given 'x'",
        "reward.code={time_s: 11}": r"reward\.code\.time_s: given 11",
        "reward.name.math=1": r"reward\.name\.math: reward\.name is no mapping of names so far; give all of it",
        "reward.by_source.a.math=1": r"reward\.by_source\.a\.math: reward\.by_source\.a is no mapping",
    }.items():
        with pytest.raises(ConfigError, match=rf"\n  {message}|^{message}") as caught:
            changed("reward.name=code", override) if "code" in override else changed(override)
        assert "function-" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"reward\.name: '\{math:1\}' would be read as .* the key 'math:1' without a value"):
        changed("reward.name={math:1}")
    site = DEFAULT_CLUSTER.parents[1] / "sites" / "login_node.yaml"
    with pytest.raises(ConfigError, match=r"login_node\.yaml: not a cluster .*launch --site.*h100x8\.yaml.*gpus_per_node"):
        load_cluster(site)


def test_a_file_stands_for_the_settings_in_it(tmp_path: Path) -> None:
    layout = tmp_path / "layout.yaml"
    layout.write_text("# a comment\nparallel: {tensor: 2, expert_tensor: null}\ntransfer: {transport: nccl}\nname: 'null'\n")
    found = changed("parallel.data=3", f"@{layout}", "parallel.tensor=4")
    assert (found.parallel.tensor, found.parallel.data, found.parallel.expert_tensor) == (4, 3, None)
    assert (found.transfer.transport, found.name) == ("nccl", "null")
    layout.write_text("parallel: {tensr: 2}")
    with pytest.raises(ConfigError, match=r"parallel\.tensr"):
        changed(f"@{layout}")
    layout.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"layout\.yaml: expected a mapping of sections, found list"):
        changed(f"@{layout}")
    with pytest.raises(ConfigError, match=r"missing\.yaml: not a YAML file that can be read"):
        changed(f"@{tmp_path / 'missing.yaml'}")


def test_a_recipe_takes_a_file_among_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "layout").write_text("parallel:\n  data: 3\n")
    source = tmp_path / "recipe.py"
    source.write_text(
        "from megatron_hpt.config import *\n"
        "def recipe(size: int = 1) -> Config:\n"
        "    return Config(name=str(size), model=ModelConfig(path='x'), data=DataConfig(train='x'))\n"
    )
    found = recipe.load(str(source), ["size=2", f"@{tmp_path / 'layout'}"])
    assert (found.config.name, found.config.parallel.data) == ("2", 3)
    assert found.overrides == ["parallel={data: 3}"]
