"""What users write, under the type checkers: never run, and part of `make lint`. A wrong inference is an error here."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

from chest import Chest


def use_as_a_dict(mapping: MutableMapping[str, list[int]]) -> int:
    return sum(len(value) for value in mapping.values())


def keys_and_values_have_types(path: Path) -> None:
    c: Chest[str, list[int]] = Chest(path=path, available_memory="20 MB")
    c["x"] = [1, 2]
    c["x"].append(3)
    assert_type(c["x"], list[int])
    assert_type(c.get("x"), "list[int] | None")
    assert_type(list(c), list[str])
    assert_type(len(c), int)
    assert_type("x" in c, bool)
    use_as_a_dict(c)
    for key, value in c.items():
        assert_type(key, str)
        assert_type(value, list[int])
    c["x"] = "no list"  # type: ignore[assignment]
    c[1] = [1]  # type: ignore[index]


def content_gives_the_types() -> None:
    c = Chest({"a": 1.5})
    assert_type(c, Chest[str, float])


def the_arguments_of_old(path: str) -> None:
    with Chest[Any, Any](None, path, 1e9, json.dump, json.load, mode="t") as c:
        c.prefetch(["x"])
        c.flush()
        c.sync()
        c.drop()


def what_it_tells(c: Chest[Any, Any]) -> None:
    assert_type(c.path, str)
    assert_type(c.available_memory, int)
    assert_type(c.memory_usage, int)
    assert_type(c.key_to_filename("x"), str)
    assert_type(c.stats().hits, int)
    assert_type(c.stats().disk_bytes, int)


def nonsense_is_refused() -> None:
    Chest(available_memory=["20 MB"])  # type: ignore[arg-type]
    Chest(memory="20 MB")  # type: ignore[call-arg]
