"""A chest that is sent to other processes: pickled, and opened there by its path."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest, _fs, _scratch
from chest.errors import ChestError, ClosedError, PathError, SerializeError
from forking import environment

TIMEOUT_S = 120
METHODS = multiprocessing.get_all_start_methods()


def _sent(chest: Any) -> Any:
    return pickle.loads(pickle.dumps(chest))


# --- in one process


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_pickled_is_written_and_opened_again(chest: Chest[Any, Any], protocol: int) -> None:
    with pickle.loads(pickle.dumps(chest, protocol)) as other:
        assert other is not chest
        assert type(other) is Chest
        assert other.path == chest.path
        assert other["small"] == [1]
        assert np.array_equal(other["large"], chest["large"])
        other["new"] = 2
        other.sync()
        assert chest["new"] == 2
    assert chest["small"] == [1]


def test_the_pickle_is_small_whatever_the_chest_holds(chest: Chest[Any, Any]) -> None:
    assert len(pickle.dumps(chest)) < 1000


def _label(key: Any) -> str:
    return f"value-{key}"


def _called(key: Any) -> None:
    pass


def _pickle_dump(value: Any, file: Any) -> None:
    pickle.dump(value, file, protocol=4)


def _pickle_load(file: Any) -> Any:
    return pickle.load(file)


class Reversed:
    """A serializer of the user's."""

    @staticmethod
    def dump(value: Any, file: Any) -> None:
        file.write(pickle.dumps(value)[::-1])

    @staticmethod
    def load(file: Any) -> Any:
        return pickle.loads(file.read()[::-1])


class Configured(Reversed):
    def __init__(self, level: int) -> None:
        self.level = level


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "memory": {"available_memory": "3 MB"},
    "no memory": {"available_memory": 0},
    "a pair": {"dump": _pickle_dump, "load": _pickle_load},
    "json by name": {"serializer": "json"},
    "json as a module": {"serializer": json},
    "json as a pair": {"dump": json.dump, "load": json.load},
    "json as text": {"dump": json.dump, "load": json.load, "mode": "t"},
    "a class": {"serializer": Reversed},
    "an object": {"serializer": Configured(3)},
    "callbacks": {"on_miss": _called, "on_overflow": _called},
    "file names": {"key_to_filename": _label},
    "open": {"open": gzip.open},
    "rules": {"loose": None, "verify": "always", "write_through": True, "network": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["path", "scratch"])
def test_every_setting_is_sent(tmp_path: Path, kind: str, settings: str) -> None:
    given = SETTINGS[settings]
    with Chest[str, Any](path=tmp_path / "c" if kind == "path" else None, **given) as chest:
        chest["a"] = [1]
        with _sent(chest) as other, _sent(other) as third:
            for one in (other, third):
                assert one["a"] == [1]
                assert one._has_company()
                assert one.available_memory == chest.available_memory
                assert (one._on_miss, one._on_overflow) == (chest._on_miss, chest._on_overflow)
                assert one._store.codec.name == chest._store.codec.name
                assert one._write_through == chest._write_through
                same = {name: setting for name, setting in one._given.items() if name != "serializer"}
                assert same == {name: setting for name, setting in chest._given.items() if name != "serializer"}
                assert type(one._given["serializer"]) is type(chest._given["serializer"])
            third["b"] = [2]
            third.sync()
            assert chest["b"] == [2]
            assert os.path.basename(other.key_to_filename("b")) == os.path.basename(chest.key_to_filename("b"))


def test_no_setting_of_the_constructor_is_forgotten() -> None:
    import inspect

    with Chest[str, int]() as chest:
        sent = chest._sent()[0]
    assert {*sent, "data", "path"} == set(inspect.signature(Chest).parameters)


def test_available_memory_is_sent_as_it_is_now(chest: Chest[Any, Any]) -> None:
    chest.available_memory = 123_456
    with _sent(chest) as other:
        assert other.available_memory == 123_456


def test_a_chest_that_others_may_use_knows(chest: Chest[Any, Any]) -> None:
    assert not chest._shared
    with _sent(chest) as other:
        assert chest._shared
        assert other._shared


def test_a_closed_chest_is_a_closed_error(chest: Chest[Any, Any]) -> None:
    chest.close()
    with pytest.raises(ClosedError):
        pickle.dumps(chest)


def test_what_cannot_be_written_is_the_error_of_sync(chest: Chest[Any, Any]) -> None:
    chest["bad"] = lambda: None
    with pytest.raises(SerializeError, match="'bad'"):
        pickle.dumps(chest)
    del chest["bad"]


def test_a_setting_that_cannot_be_pickled_is_an_error(tmp_path: Path) -> None:
    with (
        Chest[str, int](path=tmp_path / "c", on_miss=lambda key: None) as chest,
        pytest.raises((pickle.PicklingError, AttributeError)),
    ):
        pickle.dumps(chest)


def test_a_path_that_is_gone_is_an_error_and_nothing_is_made_there(tmp_path: Path) -> None:
    chest = Chest[str, int](path=tmp_path / "c")
    data = pickle.dumps(chest)
    chest.drop()
    with pytest.raises(PathError, match="no chest"):
        pickle.loads(data)
    assert list(tmp_path.iterdir()) == []


class Counting(Chest[str, int]):
    """A subclass with a constructor and attributes of its own."""

    def __init__(self, path: Any, step: int) -> None:
        super().__init__(path=path)
        self.step = step

    def increase(self, key: str) -> None:
        self[key] = self.get(key, 0) + self.step


def test_a_subclass_keeps_its_class_and_its_attributes(tmp_path: Path) -> None:
    with Counting(tmp_path / "c", 3) as chest:
        chest.increase("a")
        with _sent(chest) as other:
            assert type(other) is Counting
            assert other.step == 3
            other.increase("a")
            other.sync()
        assert chest["a"] == 6


def test_copy_and_deepcopy_are_scratch_chests_of_their_own(chest: Chest[Any, Any]) -> None:
    chest["rows"] = [[1]]
    for make in (copy.copy, copy.deepcopy):
        with make(chest) as other:
            assert other.path != chest.path
            assert not other._shared
            assert list(other) == list(chest)
            other["rows"][0].append(2)
            assert other["rows"] == [[1, 2]]
            assert chest["rows"] == [[1]]


def test_deepcopy_of_what_cannot_be_linked_copies_the_values(tmp_path: Path) -> None:
    with Chest[str, Any](path=tmp_path / "c", open=gzip.open) as chest:
        chest["rows"] = [[1]]
        held = chest["rows"]
        with copy.deepcopy({"inside": chest})["inside"] as other:
            other["rows"][0].append(2)
            assert held == [[1]]
            assert other._given["open"] is gzip.open


# --- scratch chests


def test_a_scratch_folder_goes_with_its_last_chest(place: Path) -> None:
    for closing in (0, 1), (1, 0):
        chest = Chest[str, int]()
        chest["a"] = 1
        both = chest, _sent(chest)
        both[closing[0]]["last words"] = 2
        both[closing[0]].close()
        assert both[closing[1]]["last words"] == 2
        assert os.path.isdir(chest.path)
        both[closing[1]].close()
        assert list(place.iterdir()) == []


def test_a_scratch_folder_that_was_sent_goes_when_all_are_collected(place: Path) -> None:
    chest = Chest[str, int]()
    other = _sent(chest)
    del chest
    gc.collect()
    other["a"] = 1
    del other
    gc.collect()
    assert list(place.iterdir()) == []


def test_a_scratch_chest_that_is_gone_is_an_error(place: Path) -> None:
    chest = Chest[str, int]()
    data = pickle.dumps(chest)
    chest.close()
    with pytest.raises(PathError, match="is gone"):
        pickle.loads(data)
    assert list(place.iterdir()) == []


def test_a_scratch_chest_that_failed_to_open_owns_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chest = Chest[str, int]()
    data = pickle.dumps(chest)
    with monkeypatch.context() as patch:
        patch.setattr(Chest, "_open_store", lambda self, codec: (_ for _ in ()).throw(OSError("mine")))
        with pytest.raises(OSError, match="mine"):
            pickle.loads(data)
    chest.close()
    assert list(place.iterdir()) == []


RECEIVES = (
    "import pickle, sys, os\n"
    "chest = pickle.load(sys.stdin.buffer)\n"
    "print(chest['a'], flush=True)\n"
    "sys.stdin.buffer.read(1)\n"
    "chest['b'] = 2\n"
)


def _receiver(data: bytes, end: str) -> subprocess.Popen[bytes]:
    env = environment()
    process = subprocess.Popen([sys.executable, "-c", RECEIVES + end], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(data)
    process.stdin.flush()
    assert process.stdout.readline() == b"1\n"
    return process


@pytest.mark.parametrize("end", ["chest.close()", "del chest", "chest.sync(); os._exit(0)", "sys.exit()"])
def test_a_scratch_folder_stays_as_long_as_a_receiver_lives(place: Path, end: str) -> None:
    chest = Chest[str, int]()
    chest["a"] = 1
    with _receiver(pickle.dumps(chest), end) as process:
        try:
            assert len(_fs.owners(os.path.join(chest.path, ".keys"))) == 2
            chest.close()
            assert os.path.isdir(chest.path)
            process.communicate(b".", timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0
    if "_exit" in end:  # nobody was left to remove it
        assert _scratch.sweep_scratch(str(place)) == 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("end", ["chest.close()", "del chest", "chest.sync(); os._exit(0)", "sys.exit()"])
def test_the_end_of_a_receiver_leaves_the_senders_scratch_folder_and_what_was_written(place: Path, end: str) -> None:
    with Chest[str, int]() as chest:
        chest["a"] = 1
        with _receiver(pickle.dumps(chest), end) as process:
            try:
                process.communicate(b".", timeout=TIMEOUT_S)
            finally:
                process.kill()
        assert process.returncode == 0
        assert chest["b"] == 2
    assert list(place.iterdir()) == []


def test_pickling_within_a_transaction_is_refused_since_it_is_not_written_yet(chest: Chest[Any, Any]) -> None:
    with chest.transaction():
        chest["a"] = 1
        with pytest.raises(ChestError, match="transaction"):
            pickle.dumps(chest)
    with _sent(chest) as other:
        assert other["a"] == 1
