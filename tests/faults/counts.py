"""The counts of a torture run: a line of JSON for each sweep, for a report to collect."""

from __future__ import annotations

import json
import os


def count(what: str, tried: int, survived: int, control: bool = False) -> None:
    """Append how many cases a test has tried and how many were survived, to the file that CHEST_COUNTS names.

    A ``control`` is meant to be caught: its ``survived`` are the cases that were not.
    """
    if not (path := os.environ.get("CHEST_COUNTS")):
        return
    line = {"what": what, "tried": tried, "survived": survived} | ({"control": True} if control else {})
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
