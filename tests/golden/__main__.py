"""`python -m tests.golden FILE.npz...`: the error of every recorded array; exit status 1 above the
tolerance.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.golden.case import load_case
from tests.golden.replay import TOLERANCE, replay, tolerance
from vmkd_fx.table import table


def main(files: list[str]) -> int:
    """Replay each file, print its table, and return the exit status."""
    if not files:
        print("usage: python -m tests.golden FILE.npz...", file=sys.stderr)
        return 2
    failed = []
    for file in files:
        case = load_case(file)
        errors = replay(case)
        wrong = {name for name, error in errors.items() if not error <= tolerance(case, name)}
        rows = [(name, f"{e:.1e}", "FAILED" if name in wrong else "") for name, e in errors.items()]
        print(table((Path(file).name, "relative error", ""), rows), end="\n\n")
        if wrong or not errors:
            failed.append(file)
    print(f"{len(files) - len(failed)} of {len(files)} files within {TOLERANCE:g}")
    for file in failed:
        print(f"FAILED {file}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
