"""Write the parquet files that recipes train on.

python tools/prepare_data.py arithmetic build/quickstart
python tools/prepare_data.py word-problems build/gsm --train 2000 --held-out 48
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_hpt.examples import arithmetic as sums
from megatron_hpt.examples import word_problems as words

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Argument(help="folder for train.parquet and heldout.parquet")]


@app.command()
def arithmetic(out: Out, held_out: int = 64, seed: int = 0) -> None:
    """Sums of three numbers from 1 to 9, every step written out (the quickstart's task)."""
    sums.write(out, held_out, seed)
    print(f"wrote {out}/train.parquet and {out}/heldout.parquet")


@app.command()
def word_problems(out: Out, train: int = 2000, held_out: int = 48) -> None:
    """Grade-school word problems with step-by-step solutions, from reasoning-gym's gsm_symbolic."""
    words.write(out, train, held_out)
    print(f"wrote {train} problems to {out}/train.parquet and {held_out} to {out}/heldout.parquet")


if __name__ == "__main__":
    app()
