"""Loading prompts: what is good, and what is refused with file, row and field."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hpt import recipe
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.data.parquet import write_problems
from megatron_hpt.data.prompts import LengthLimits, load_prompts
from megatron_hpt.errors import ConfigError, DataError, ModelError
from megatron_hpt.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
LIMITS = LengthLimits(prompt=16, response=32)
GOOD = {
    "prompt": [{"role": "user", "content": "1+2+3"}],
    "target": [{"role": "assistant", "content": "1+2=3,\\boxed{6}"}],
    "reward_model": {"style": "rule", "ground_truth": "6"},
    "extra_info": {"split": "train", "index": "a"},
}


def write(tmp_path: Path, *rows: dict) -> str:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def test_prompt_and_demonstration_are_tokenised_once(tmp_path: Path, tokenizer) -> None:
    prompt = load_prompts(write(tmp_path, GOOD), tokenizer, LIMITS)[0]
    assert tokenizer.decode(prompt.tokens) == "1+2+3\n"
    assert tokenizer.decode(prompt.demonstration) == "1+2=3,\\boxed{6}<eos>"
    assert (prompt.prompt_id, prompt.ground_truth) == ("a", "6")


def test_a_row_without_demonstration_is_fine(tmp_path: Path, tokenizer) -> None:
    assert load_prompts(write(tmp_path, {**GOOD, "target": None}), tokenizer, LIMITS)[0].demonstration is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [{"role": "user", "content": "  "}]}, r"data\.parquet, row 1, prompt: a message is empty"),
        ({"target": [{"role": "assistant", "content": "a"}] * 2}, r"row 1, target: 2 messages; a demonstration is one message"),
        ({"prompt": []}, r"data\.parquet, row 1, prompt: given \[\]"),
        ({"prompt": [{"role": "user", "content": "1+" * 30}]}, r"row 1, prompt: 61 tokens; data\.max_prompt_length allows 16"),
        (
            {"target": [{"role": "assistant", "content": "1+" * 30}]},
            r"row 1, target: 61 tokens .* data\.max_response_length allows 32",
        ),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, r"row 1, reward_model\.ground_truth: given None"),
        ({"extra_info": {"split": "train", "index": "a"}}, r"row 1, extra_info\.index: 'a' is also the id of row 0"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer, change: dict, message: str) -> None:
    bad = {**GOOD, "extra_info": {"split": "train", "index": "b"}, **change}
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, GOOD, bad), tokenizer, LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": "text"}, r"data\.parquet, column reward_model: is of type string; expected a record with the text"),
        ({"extra_info": "text"}, r"column extra_info: is of type string; expected a record with index"),
        ({"prompt": "text"}, r"column prompt: is of type string; expected a list of messages"),
        ({"prompt": ["text"]}, r"column prompt: is of type list<.*string>; expected a list of messages"),
        ({"prompt": [{"role": "user"}]}, r"column prompt: is of type list<.*>; expected a list of messages"),
        ({"target": "text"}, r"column target: is of type string; expected a list of messages"),
        ({"target_lst": [1]}, r"column target_lst: is of type list<.*int64>; expected a list of demonstrations"),
        ({"reward_model": {"ground_truth": 3}}, r"column reward_model: is of type struct<ground_truth: int64>; expected"),
        ({"data_source": 3}, r"column data_source: is of type int64; expected text"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, tokenizer, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, {**GOOD, **change}), tokenizer, LIMITS)


def test_a_missing_column_is_named(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match="column reward_model missing; it has prompt, target"):
        load_prompts(write(tmp_path, {k: GOOD[k] for k in ("prompt", "target")}), tokenizer, LIMITS)


def test_no_file_no_parquet_no_rows(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_prompts(str(tmp_path / "none.parquet"), tokenizer, LIMITS)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_prompts(str(tmp_path / "text.parquet"), tokenizer, LIMITS)
    (tmp_path / "text.jsonl.gz").write_text("packed")
    with pytest.raises(DataError, match=r"text\.jsonl\.gz: not a kind of file that is read; allowed: \*\.parquet"):
        load_prompts(str(tmp_path / "text.jsonl.gz"), tokenizer, LIMITS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: a folder without any; expected"):
        load_prompts(str(tmp_path / "folder"), tokenizer, LIMITS)
    write_problems(tmp_path / "empty.parquet", [], "x", "train")
    with pytest.raises(DataError, match="has no rows"):
        load_prompts(str(tmp_path / "empty.parquet"), tokenizer, LIMITS)


@pytest.fixture
def config(tiny_model: Path) -> Config:
    return Config(name="x", model=ModelConfig(path=str(tiny_model)), data=DataConfig(train="t"))


def test_a_recipes_template_renders_prompts_and_nothing_is_added(tmp_path: Path, config: Config) -> None:
    config.data.chat_template = "1+{{ messages[-1]['content'] }}\n1="
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(load_prompts(write(tmp_path, GOOD), tokenizer, LIMITS)[0].tokens) == "1+1+2+3\n1="
    config.data.chat_template = None
    assert tokenizer.chat_template != load_tokenizer(config).chat_template


def test_a_base_model_without_a_template_needs_one_from_the_recipe(tmp_path: Path, config: Config) -> None:
    shutil.copytree(config.model.path, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    config.model.path = str(tmp_path / "base")
    with pytest.raises(ModelError, match=r"no chat template .*; set data\.chat_template"):
        load_tokenizer(config)
    config.data.chat_template = "{{ messages[0]['content'] }}="
    assert load_tokenizer(config).chat_template == config.data.chat_template


def fast_tokenizer(template: str):
    """Bytes as tokens, and a beginning-of-sequence token that it adds unless it is told not to, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{byte: 2 + i for i, byte in enumerate(alphabet)}}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=template)


def test_the_seeds_plain_text_prompt_of_llama(tmp_path: Path) -> None:
    """seed.md 4.1: the suffix follows the question, and there is no beginning-of-sequence token."""
    template = recipe.load(str(ROOT / "recipes" / "llama_3_1.py"), []).config.data.chat_template
    words = fast_tokenizer(template)
    assert words("x").input_ids[0] == words.bos_token_id
    chat = [{"role": "system", "content": "left out"}, {"role": "user", "content": "What is 1+2?\n(an integer)"}]
    (prompt,) = load_prompts(write(tmp_path, {**GOOD, "prompt": chat}), words, LengthLimits(1000, 1000))
    assert words.decode(prompt.tokens) == (
        "Question:\nWhat is 1+2?\n(an integer)\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        "Answer:\nLet's think step by step."
    )
    assert words.decode(prompt.demonstration) == "1+2=3,\\boxed{6}</s>"


OPEN = "{{ messages[-1]['content'] }}\n{{ '<think>\n' }}"  # Jinja drops a line's end at a template's end


@pytest.mark.parametrize(
    ("template", "written", "response"),
    [
        (OPEN, "<think>\nSo.\n</think>\n6", "So.\n</think>\n6"),
        (OPEN, "<think>So.</think>6", "So.</think>6"),
        (OPEN, "So.</think>6", "So.</think>6"),
        (OPEN, " \n<think>\nSo.", "So."),
        (OPEN, "\n\nSo.</think>6", "\n\nSo.</think>6"),
        (OPEN, "So. <think>", "So. <think>"),  # not where it begins
        (OPEN, "<thinking>So.", "<thinking>So."),
        ("{{ messages[-1]['content'] }}<|begin_of_thought|>", " <|begin_of_thought|> So.", " So."),
        ("{{ messages[-1]['content'] }}[THINK]", "\n[THINK]So.", "So."),
        ("{{ messages[-1]['content'] }}<think>\n</think>", "<think>\nSo.", "<think>\nSo."),
        ("{{ messages[-1]['content'] }}\n<think>", "<think>\nSo.", "\nSo."),
        ("{{ messages[-1]['content'] }}\n", "<think>\nSo.", "<think>\nSo."),
    ],
)
def test_a_think_that_the_prompt_has_opened_is_not_opened_again(
    tmp_path: Path, template: str, written: str, response: str
) -> None:
    words = fast_tokenizer(template)
    path = write(tmp_path, {**GOOD, "target": [{"role": "assistant", "content": written}]})
    (prompt,) = load_prompts(path, words, LengthLimits(1000, 1000))
    assert words.decode(prompt.demonstration) == response + "</s>"
    rendered = words.apply_chat_template(GOOD["prompt"], add_generation_prompt=True, return_dict=False)
    assert prompt.tokens == rendered  # as rollouts are


@pytest.mark.parametrize(
    ("several", "found"),
    [
        (["1+2", "9"], "1+2<eos>"),
        ([[{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "9"}]], "7<eos>"),
        ([], "1+2=3,\\boxed{6}<eos>"),
        (None, "1+2=3,\\boxed{6}<eos>"),
        (["1+" * 30, "9"], "9<eos>"),  # the first does not fit
    ],
)
def test_several_demonstrations_stand_in_place_of_one(tmp_path: Path, tokenizer, several: list | None, found: str) -> None:
    (prompt,) = load_prompts(write(tmp_path, {**GOOD, "target_lst": several}), tokenizer, LengthLimits(16, 32, "drop", "drop"))
    assert tokenizer.decode(prompt.demonstration) == found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages", r"data\.chat_template: not a template that renders a question"),
        ("Question: {prompt}", r"data\.chat_template: given 'Question: \{prompt\}'; .* lacks its question"),
        ("", r"data\.chat_template: given ''; .* lacks its question"),
    ],
)
def test_a_template_without_the_question_is_refused(config: Config, template: str, message: str) -> None:
    config.data.chat_template = template
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(config)
