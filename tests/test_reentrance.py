"""Code of the user's that a chest runs in the middle of its work and that uses the same chest; chests that are not whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chest import Chest

CHESTS: list[Chest[Any, Any]] = []


@pytest.fixture(name="chest")
def _chest(tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        CHESTS.append(chest)
        yield chest
        CHESTS.clear()


class Counted:
    """Counts in the chest how often it is pickled."""

    def __reduce__(self) -> Any:
        for chest in CHESTS:
            chest["count"] += 1
        return Counted, ()


@pytest.mark.parametrize("stored", [False, True])
def test_a_key_that_is_set_while_others_are_serialized_is_written(chest: Chest[Any, Any], tmp_path: Path, stored: bool) -> None:
    chest["count"] = 0
    if stored:
        chest.sync()
        chest["count"] = 0
    chest["value"] = Counted()
    chest.sync()
    count = chest["count"]
    assert count > 0
    assert len(chest) == len(list(chest)) == 2
    CHESTS.clear()
    chest.sync()
    with Chest[Any, Any](path=tmp_path / "c") as again:
        assert again["count"] == count
        assert list(again) == ["count", "value"]


def test_what_on_overflow_deletes_or_replaces_is_not_written() -> None:
    def change(key: str) -> None:
        if key == "deleted" and key in chest:
            del chest[key]
        if key == "replaced" and chest[key] != b"new":
            chest[key] = b"new"

    with Chest[str, bytes](available_memory=1 << 20, on_overflow=change) as chest:
        chest["deleted"] = chest["replaced"] = bytes(50_000)
        for i in range(40):
            chest[f"other {i}"] = bytes(50_000)
        assert chest.stats().spills > 2
        for _ in range(2):
            assert "deleted" not in chest
            assert chest["replaced"] == b"new"
            assert len(chest) == len(list(chest)) == 41
            chest.flush()


class Unfinished(Chest[Any, Any]):
    """Its constructor fails, or is never called."""

    def __init__(self) -> None:
        raise LookupError


USES: list[Callable[[Any], Any]] = [
    lambda c: c["k"],
    lambda c: c.__setitem__("k", 1),
    lambda c: c.__delitem__("k"),
    lambda c: "k" in c,
    lambda c: c.get("k"),
    lambda c: c.pop("k"),
    lambda c: c.flush(),
    len,
    list,
]


@pytest.mark.parametrize("use", USES)
def test_a_chest_that_was_never_constructed_raises(use: Callable[[Any], Any]) -> None:
    with pytest.raises((AttributeError, TypeError)):
        use(Unfinished.__new__(Unfinished))


@pytest.mark.parametrize("name", ["_entries", "_dirty", "_unsure", "_tombs", "_lent", "_store", "_tier", "lock"])
@pytest.mark.parametrize("use", USES[:4])
def test_a_subclass_that_takes_the_name_of_an_attribute_gets_an_error(name: str, use: Callable[[Any], Any]) -> None:
    with Chest[str, Any]({"k": [1]}) as chest:
        chest.flush()
        before = getattr(chest, name)
        setattr(chest, name, 5)
        with contextlib.suppress(Exception):  # or it does not matter here
            use(chest)
        setattr(chest, name, before)
