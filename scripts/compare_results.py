"""Compare the effectiveness tables of two results folders: ``compare_results.py results/embedded other/embedded``.

Every CSV is compared byte by byte; one whose bytes differ is compared value by value (as text) over the columns that
both have, by name, or by content where a column was renamed.  Measured times are left out: they differ from run to
run.  The exit status is 1 when a value differs, or a table is there once.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

#: Tables of measured times, and of what is computed from them.
TIMED = ("latency_", "claim4_ratios", "claims", "allocator_latency", "effectiveness_latency", "backbones")
#: Columns of measured times in the other tables.
TIMED_COLUMNS = {"seconds"}
#: Labels that are worded anew: the old text, and the one that it is compared as.
RENAMED = {"parent, attention both ways": "parent, bidirectional attention"}


def columns(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file as text, measured times left out."""
    with open(path, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    return {name: [RENAMED.get(row[i], row[i]) for row in rows] for i, name in enumerate(head) if name not in TIMED_COLUMNS}


def compare(one: Path, other: Path) -> tuple[bool, str]:
    """Whether a table is equal in two folders, and in what way it is or is not."""
    for path in (one, other):
        if not path.is_file():
            return False, f"missing in {path.parent.parent}"
    if one.read_bytes() == other.read_bytes():
        return True, "equal, byte by byte"
    left, right = columns(one), columns(other)
    gone, added = [name for name in left if name not in right], [name for name in right if name not in left]
    notes = []
    for name in gone:
        renamed = next((new for new in added if right[new] == left[name]), None)
        if renamed is None:
            return False, f"different: column {name!r} is gone"
        added.remove(renamed)
        notes.append(f"{name} is now {renamed}")
    for name in left:
        if name in right and left[name] != right[name]:
            rows = [i for i, (a, b) in enumerate(zip(left[name], right[name])) if a != b]
            if not rows:
                return False, f"different: {len(left[name])} and {len(right[name])} rows"
            at = rows[0]
            return False, f"different: {len(rows)} values of {name!r}, first {left[name][at]} and {right[name][at]}"
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
