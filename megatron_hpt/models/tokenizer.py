"""The tokenizer of a run, with the template that its prompts are rendered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError, HptError, ModelError
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.fidelity import as_its_file

_QUESTION = "How many primes are below 100?"


def load_tokenizer(config: Config) -> Any:
    """Load the tokenizer of `model.path`, with `data.chat_template` in place of its own template.

    Raises:
        ModelError: there is none, it has no end-of-sequence token or no template, or it is not what its file says.
        ConfigError: the recipe's template is not one.
    """
    folder = hf_side(config.model.path)
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(f"model.path: {folder} has no tokenizer (tokenizer.json)")
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path: the tokenizer in {folder} has no end-of-sequence token; responses could not end")
    if config.data.chat_template is not None:
        tokenizer.chat_template = config.data.chat_template
        _check_template(tokenizer)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model.path: the tokenizer in {folder} has no chat template to render prompts with (a base model has none); set "
            "data.chat_template"
        )
    return tokenizer


def read_tokenizer(folder: str | Path) -> Any:
    """Read the tokenizer of a model folder as its files say, whatever its class is called.

    Raises:
        ModelError: transformers cannot read it, or reads it otherwise than its tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = as_its_file(AutoTokenizer.from_pretrained(folder), str(folder))
    except HptError:
        raise
    except Exception as error:  # of transformers and of the tokenizers library, whose errors are plain Exceptions
        raise ModelError(f"model.path: the tokenizer in {folder} cannot be read: {error}") from None
    tokenizer.clean_up_tokenization_spaces = False  # "1 , 2" is not "1, 2": what is graded is what was sampled
    return tokenizer


def _check_template(tokenizer: Any) -> None:
    """Check that the template renders, and keeps the question: without it a run would train and sample without an error.

    Raises:
        ConfigError: it does not.
    """
    chat = [{"role": "user", "content": _QUESTION}]
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template computes what it likes
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"data.chat_template: not a template that renders a question: {said}") from None
    if _QUESTION not in text:
        raise ConfigError(
            f"data.chat_template: given {tokenizer.chat_template!r}; a prompt rendered with it lacks its question, e.g. "
            "{{ messages[-1]['content'] }}"
        )
