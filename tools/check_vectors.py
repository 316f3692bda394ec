"""Check objective and grader against what the reference code gives: one line a function, exit code 1 on any miss.

tools/check_vectors.py [LOSS.json] [--grader GRADER.json]
"""

from pathlib import Path
from typing import Annotated

import typer
from reference_vectors.check import CaseOutcome, check_file
from reference_vectors.graders import check_graders

from megatron_hpt import command
from megatron_hpt.errors import DataError


def main(
    losses: Annotated[Path | None, typer.Argument(help="vectors of losses, advantages and gates")] = None,
    grader: Annotated[Path | None, typer.Option(help="vectors of graders")] = None,
) -> None:
    if not losses and not grader:
        raise DataError("given no file; expected LOSS.json, --grader GRADER.json, or both")
    outcomes = (check_file(losses) if losses else []) + ([check_graders(grader)] if grader else [])
    for outcome in outcomes:
        report(outcome)
    missed = sum(bool(outcome.misses) for outcome in outcomes)
    print(
        f"{sum(o.cases for o in outcomes)} cases, {sum(o.quantities for o in outcomes)} quantities, {missed} functions missed"
    )
    raise typer.Exit(1 if missed else 0)


def report(outcome: CaseOutcome) -> None:
    verdict = f"MISSED {len(outcome.misses)}" if outcome.misses else "ok"
    print(f"{outcome.function:<50} {outcome.cases:3d} cases  {outcome.quantities:4d} quantities  {verdict}")
    for miss in outcome.misses:
        print(f"    missed   {miss}")
    for reason, cases in outcome.treated.items():
        print(f"    treated  {reason}: {', '.join(cases)}")


if __name__ == "__main__":
    command.run(lambda: typer.run(main), error_code=2)
