"""What can be wrong with a chest, and what a repair does about it."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["KINDS", "Finding", "Problem"]

KINDS = {
    "index": "the index is rebuilt from what can be read of it and from the value files",
    "record": "the value comes from its file if there is one; else the record is set aside",
    "order": "the order is rebuilt from the records",
    "key": "the key comes from its value file if there is one; else the record is set aside",
    "missing": "the value file is looked for under all other names; else the record is set aside",
    "value": "a whole file with the same content takes its place if there is one; else both are set aside",
    "orphan": "it becomes the value of its key again if that has none; else it is set aside",
    "note": "the note is written anew from the records, or dropped",
    "meta": "the setting is worked out again",
    "log": "what the last commits were about is forgotten: those who follow changes look through all keys once",
    "copy": "what lies in the place of a readable copy is set aside",
    "generation": "the number of the newest commit is put in",
    "seal": "",
    "old-format": "",  # the first write upgrades it
    "format": "",
    "unreadable": "",
    "unsafe": "",
}
"""All kinds of problems, and what ``repair=True`` does about each ("" for nothing)."""


class Problem(NamedTuple):
    """Something that is wrong with a chest.

    Attributes:
        kind: one of ``KINDS``.
        key: the key concerned; None where there is none, or where it cannot be told (see the message).
        path: the file or folder concerned.
        message: what is wrong, for people.
        repair: what ``repair=True`` does about it; "" where nothing can be done by a program.
    """

    kind: str
    key: Any
    path: str
    message: str
    repair: str


class Finding(NamedTuple):
    """A problem, and the name in the index of the key that it is about."""

    problem: Problem
    name: bytes = b""
