"""Regenerate docs/parity.md: case × quantity × largest error against what the reference implementations computed.

    python scripts/parity_table.py                          # the cases in tests/goldens, into docs/parity.md
    python scripts/parity_table.py --golden FOLDER          # other cases of the same kinds, printed

Exits with 1 if a quantity is outside its tolerance or no case was run. A case of a kind without a runner is listed as
such.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEADER = """# Parity with the reference implementations

Largest error of each quantity against what LAVIS and diffusers computed on tiny random weights (fp32, CPU). Absolute,
except gradients: ‖ours − theirs‖ / ‖theirs‖ of the worst tensor; the gradients of key biases are zero in exact
arithmetic and compared absolutely. Activations may differ by 20 × what rounding alone does to the reference
(its own fp32 against fp64), at least 1e-5. What differs on purpose is listed in [differences.md](differences.md).

Regenerate with `python scripts/parity_table.py`, which runs the cases that a clone has, or with
`--golden FOLDER --output docs/parity.md` for any folder of cases; this table is of all cases there are, those included
that would make a clone too large. Sizes, seeds and the number of processes are read from the cases.
`tests/parity/test_naive.py` compares stage 1 at drawn sizes with a second, plain writing of it besides.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, help="folder with cases, at any depth; prints instead of writing")
    parser.add_argument("--output", type=Path, help="where to write the table; docs/parity.md without --golden")
    arguments = parser.parse_args()

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # processes that a case starts import the same modules
    for folder in (ROOT, ROOT / "tests"):
        sys.path.insert(0, str(folder))
    from parity.runner import find_cases, kind_of, run_case

    root = arguments.golden or ROOT / "tests" / "goldens"
    cases = find_cases(root)
    if not cases:
        print(f"{root}: no case.json at or below it", file=sys.stderr)
        return 1
    lines = ["| case | kind | quantity | largest error | tolerance | |", "|---|---|---|---|---|---|"]
    num_run = num_bad = 0
    for case in cases:
        name = case.folder.relative_to(root).as_posix()
        kind = kind_of(case)
        if kind is None:
            lines.append(f"| {name} | no runner | | | | |")
            continue
        try:
            compared = run_case(case)
        except Exception as error:  # one broken case must not hide the others
            num_bad += 1
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            lines.append(f"| {name} | {kind} | {reason} | | | **failed** |")
            continue
        for quantity, found in compared.items():
            num_run += 1
            num_bad += not found.good
            verdict = "" if found.good else "**outside**"
            lines.append(f"| {name} | {kind} | {quantity} | {found.error:.1e} | {found.tolerance:.1e} | {verdict} |")
    lines.append(f"\n{num_run} quantities of {len(cases)} cases, {num_bad} outside their tolerance.")
    table = "\n".join(lines) + "\n"
    output = arguments.output or (None if arguments.golden else ROOT / "docs" / "parity.md")
    if output is None:
        print(table)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(HEADER + table, encoding="utf-8")
        print(f"{output}: {lines[-1].strip()}")
    return 0 if num_run and not num_bad else 1


if __name__ == "__main__":
    sys.exit(main())
