"""Checks of what is given: arguments, ids, judgements, lines of text files; a ValueError names each fault."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from numbers import Integral, Real
from pathlib import Path

#: A byte order mark, which a reader may drop, and halves of surrogate pairs.
_UNWRITABLE = re.compile("[\ufeff\ud800-\udfff]")


def whole_number(name: str, value: int, least: int = 1) -> int:
    """Return ``value``, a whole number from ``least`` to 2^31 - 1, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < 2**31:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def strings(name: str, values: Iterable[str]) -> None:
    """Check that ``values`` are several strings (a list, or a column of a table), and not one."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of strings, not {values!r}")
    odd = [value for value in values if not isinstance(value, str)]
    if odd:
        raise ValueError(f"{name} must be strings, not {type(odd[0]).__name__} (as {odd[0]!r})")


def numbers_by_id(name: str, given: Mapping[str, Mapping[str, float]], whole: bool = False) -> None:
    """Check a run, or (``whole``) judgements: query id to passage id to a finite number, or one of at most 9 digits."""
    if not isinstance(given, Mapping) or not all(isinstance(row, Mapping) for row in given.values()):
        raise ValueError(f"the {name} must map query ids to passage ids to numbers, not {given!r:.80}")
    strings(f"query ids of the {name}", given)
    kind, bound = (Integral, 10**9) if whole else (Real, inf)
    for query, row in given.items():
        strings(f"passage ids of the {name}", row)
        for passage, value in row.items():
            if not isinstance(value, kind) or isinstance(value, bool) or not abs(value) < bound:
                wanted = "a whole number of at most 9 digits" if whole else "a finite number"
                raise ValueError(f"{name}: {wanted} is needed for query {query!r}, passage {passage!r}, not {value!r}")


def identifier(value: str, what: str = "an id") -> str:
    """Return ``value``, an id or a tag, which a line of a TREC run must be able to hold."""
    if not isinstance(value, str) or value.split() != [value] or _UNWRITABLE.search(value):
        raise ValueError(f"{what} must be a string that is not empty and holds no white space, got {value!r}")
    return value


def judge(qrels: dict[str, dict[str, int]], query_id: str, passage_id: str, grade: str) -> bool:
    """Put a judgement into ``qrels``, and return whether it was there; a second one must be the same."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", grade):
        raise ValueError(f"the relevance must be an integer of at most 9 digits, got {grade!r}")
    judged = qrels.setdefault(identifier(query_id), {})
    again, first = identifier(passage_id) in judged, judged.setdefault(passage_id, int(grade))
    if first != int(grade):
        raise ValueError(f"query {query_id!r} and passage {passage_id!r} are judged twice, {first} and {int(grade)}")
    return again


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a UTF-8 file (also as ``.gz``) that is not blank, without BOM and line ends."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        number = 0
        try:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
