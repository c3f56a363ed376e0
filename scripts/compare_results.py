"""Compare the effectiveness tables of two results folders: ``compare_results.py results/embedded other/embedded``.

Every CSV is compared byte by byte; one whose bytes differ is compared value by value (as text) over the columns that
both have, by name, or by content where a column was renamed.  Measured times are left out: they differ from run to
run.  The exit status is 1 when a value differs, or a table is there once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

#: Tables of measured times, and of what is computed from them.
TIMED = ("latency", "claim4_ratios", "claims", "paper_against_ours", "effectiveness_latency", "backbones")
#: Columns of measured times in the other tables.
SECONDS = ["seconds", "query_ms", "passage_ms"]


def compare(one: Path, other: Path) -> tuple[bool, str]:
    """Whether a table is equal in two folders, and in what way it is or is not."""
    for path in (one, other):
        if not path.is_file():
            return False, f"missing in {path.parent.parent}"
    if one.read_bytes() == other.read_bytes():
        return True, "equal, byte by byte"
    tables = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (one, other))
    left, right = (table.drop(columns=SECONDS, errors="ignore") for table in tables)
    if len(left) != len(right):
        return False, f"different: {len(left)} and {len(right)} rows"
    added, notes = [name for name in right if name not in left], []
    for name in left:
        if name in right:
            rows = np.flatnonzero(left[name] != right[name])
            if len(rows):
                values = f"{left[name][rows[0]]} and {right[name][rows[0]]}"
                return False, f"different: {len(rows)} values of {name!r}, first {values}"
            continue
        renamed = next((new for new in added if (right[new] == left[name]).all()), None)
        if renamed is None:
            return False, f"different: column {name!r} is gone"
        added.remove(renamed)
        notes.append(f"{name} is now {renamed}")
    notes += [f"new column {name}" for name in added]
    return True, "equal, value by value" + (f" ({'; '.join(notes)})" if notes else " (times aside)")


def main(one: Path, other: Path) -> int:
    """Print a line for every table; return the exit status."""
    names = sorted({p.name for folder in (one, other) for p in (folder / "tables").glob("*.csv")})
    names = [name for name in names if not name.startswith(TIMED)]
    if not names:
        sys.exit(f"error: neither {one} nor {other} has a table")
    results = {name: compare(one / "tables" / name, other / "tables" / name) for name in names}
    for name, (_, text) in results.items():
        print(f"{name:32} {text}")
    equal = sum(same for same, _ in results.values())
    print(f"{equal} of {len(results)} tables are equal")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: compare_results.py RESULTS OTHER_RESULTS (two folders such as results/embedded)")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
