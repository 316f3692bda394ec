"""Tokenizers that transformers reads otherwise than their files, and templates that refuse a chat."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.data.prompts import LengthLimits, load_prompts
from megatron_hpt.errors import DataError, ModelError
from megatron_hpt.launch.training_data import look_at
from megatron_hpt.models import fidelity
from megatron_hpt.models.tokenizer import load_tokenizer
from tests.data.problems import row, write

TEMPLATE = """{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}
{% elif (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}
{% endif %}{{ message.content }}
{% endfor %}"""


def byte_level(folder: Path, class_name: str = "LlamaTokenizerFast", normalizer=None) -> Path:
    """As DeepSeek's distillations have it: a byte-level tokenizer.json, and a configuration that calls it Llama's."""
    folder.mkdir(parents=True)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        words.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["one two three, so $\\boxed{5}$ is it.\n"] * 50, trainer)
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config_of(folder: Path, train: str = "t") -> Config:
    data = DataConfig(train=train, max_prompt_length=1000, max_response_length=1000)
    return Config(name="x", model=ModelConfig(path=str(folder)), data=data)


def test_a_byte_level_tokenizer_that_calls_itself_llamas_keeps_its_spaces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, text = byte_level(tmp_path / "tokenizer"), " one  two , so\n\n$\\boxed{5}$ naïve 数"
    plain = AutoTokenizer.from_pretrained(folder)
    assert " " not in plain.decode(plain.encode(text, add_special_tokens=False))  # else this test shows nothing
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(config_of(folder))
    assert "differs from tokenizer.json" in caplog.text
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template) == ("</s>", "<s>", TEMPLATE)


def test_a_tokenizer_that_puts_spaces_behind_special_tokens_loses_nothing(tmp_path: Path) -> None:
    """As Llama 2's and Mistral's do by their tokenizer.json: a space before every part of a text."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"onetwhr"]
    words = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words.decoder = decoders.Sequence(parts)
    words.add_special_tokens(["<unk>", "<s>", "</s>"])
    words.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}
    template = "<s>[INST] {{ messages[0]['content'] }} [/INST]</s>\n<s>one"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    config = config_of(
        folder, write(tmp_path / "a.parquet", [row(0), row(1, prompt=[{"role": "user", "content": " 数  one\n\n two"}])])
    )
    assert look_at(config, load_tokenizer(config), Console(quiet=True)).prompts == 2


def test_a_tokenizer_as_its_class_says_is_read_as_that(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_tokenizer(config_of(byte_level(tmp_path / "tokenizer", "PreTrainedTokenizerFast")))
    assert "tokenizer.json" not in caplog.text


def test_one_that_differs_whatever_is_tried_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    wrong = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", lambda *_, **__: wrong)
    with pytest.raises(ModelError, match=r"reads the tokenizer in .* otherwise than its tokenizer\.json: .How many"):
        load_tokenizer(config_of(folder))


def test_a_file_that_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match=r"model\.path: the tokenizer in .* cannot be read"):
        load_tokenizer(config_of(folder))


@pytest.mark.parametrize("field", ["prompt", "target"])
def test_texts_that_tokens_lose_something_of_are_refused_before_the_start(tmp_path: Path, field: str) -> None:
    """The run's own texts: what the probes do not show."""
    folder = byte_level(tmp_path / "tokenizer", "PreTrainedTokenizerFast", normalizers.Replace("é", "e"))
    written = row(1, **{field: [{"role": "user" if field == "prompt" else "assistant", "content": "un café noir"}]})
    train = write(tmp_path / "a.parquet", [row(0), written])
    config = config_of(folder, train)
    with pytest.raises(DataError, match=r"row 1: .*caf\\xe9 noir.* comes back from its tokens as .*cafe noir"):
        look_at(config, load_tokenizer(config), Console(quiet=True))
    good = config_of(folder, write(tmp_path / "b.parquet", [row(0), row(1)]))
    assert look_at(good, load_tokenizer(good), Console(quiet=True)).rows == 2


def test_a_tokenizer_that_normalises_mathematics_away_loses_something(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer", "PreTrainedTokenizerFast", normalizers.NFKC())
    squared = row(1, target=[{"role": "assistant", "content": "it is 10² and ½"}])
    config = config_of(folder, write(tmp_path / "a.parquet", [row(0), squared]))
    with pytest.raises((DataError, ModelError), match=r"comes back from its tokens as|normal"):
        look_at(config, load_tokenizer(config), Console(quiet=True))


def test_the_probes_show_what_they_are_for(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    assert fidelity.first_difference(AutoTokenizer.from_pretrained(folder), str(folder), fidelity.PROBES[:1]) is not None
    tokenizer = load_tokenizer(config_of(folder))
    assert [fidelity.loss(tokenizer, text) for text in fidelity.PROBES] == [None] * len(fidelity.PROBES)


SYSTEM, USER, ANSWER = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([SYSTEM, USER], "of the roles system, user: System role not supported; write the system prompt into the question"),
        ([USER, USER], "of the roles user, user: Conversation roles must alternate; most templates take user and assistant"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named_wherever_it_stands(tmp_path: Path, chat: list[dict], message: str) -> None:
    """Before the start, though it is the only one among more rows than are tokenised then."""
    config = config_of(byte_level(tmp_path / "tokenizer"), str(tmp_path / "a.parquet"))
    tokenizer, rows = load_tokenizer(config), [row(number) for number in range(2000)]
    rows[1501] = row(1501, prompt=chat)
    write(tmp_path / "a.parquet", rows)
    with pytest.raises(
        DataError, match=rf"a\.parquet, row 1501, prompt: the chat template \(.*tokenizer'\) refuses .*{message}"
    ):
        look_at(config, tokenizer, Console(quiet=True))
    with pytest.raises(DataError, match="row 1501, prompt: the chat template"):
        load_prompts(str(tmp_path / "a.parquet"), tokenizer, LengthLimits(1000, 1000))
    assert load_prompts(
        write(tmp_path / "b.parquet", [row(0, prompt=[USER, ANSWER, USER])]), tokenizer, LengthLimits(1000, 1000)
    )


def test_arrays_of_token_ids_are_decoded_as_lists_are(tmp_path: Path) -> None:
    """Samples have arrays, and graders and evaluations decode them."""
    tokenizer = load_tokenizer(config_of(byte_level(tmp_path / "tokenizer", "PreTrainedTokenizerFast")))
    lists = [[*tokenizer.encode(text, add_special_tokens=False), 1] for text in ("one two, naïve 数", "", "\\boxed{5}  .")]
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    arrays = [np.array(tokens, dtype=np.int32) for tokens in lists]
    assert texts == ["one two, naïve 数", "", "\\boxed{5}  ."]
    assert tokenizer.batch_decode(arrays, skip_special_tokens=True) == texts
    assert tokenizer.batch_decode([*arrays, lists[0]], skip_special_tokens=True) == [
        *texts,
        texts[0],
    ]  # a demonstration is a list
    assert tokenizer.batch_decode(arrays[:1], skip_special_tokens=True) == texts[:1]
    assert [tokenizer.decode(array, skip_special_tokens=True) for array in arrays] == texts
