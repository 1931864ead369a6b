"""Serializers: pairs, names, modules, objects; and what a chest remembers of them."""

from __future__ import annotations

import copy
import gzip
import json
import marshal
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import dill
import joblib
import numpy as np
import pytest

from chest import Chest, LoadError, SerializeError, SerializerMismatchError


class Repr:
    """A serializer of the user's."""

    def dump(self, value: Any, file: Any) -> None:
        file.write(repr(value))

    def load(self, file: Any) -> Any:
        return eval(file.read().decode())


PLAIN = {"x": [1, 2, 3], "y": {"a": None, "b": [True, 2.5]}, "big": ["text"] * 30_000}

SERIALIZERS = [
    "pickle",
    "safe",
    "json",
    "marshal",
    "cloudpickle",
    "dill",
    "joblib",
    json,
    marshal,
    pickle,
    cloudpickle,
    dill,
    joblib,
    Repr(),
]


@pytest.mark.parametrize("serializer", SERIALIZERS, ids=lambda s: getattr(s, "__name__", str(type(s).__name__)))
@pytest.mark.parametrize("limit", [10**9, 0])
def test_values_come_back(serializer: Any, limit: int, tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer=serializer, available_memory=limit) as c:
        c.update(copy.deepcopy(PLAIN))
        c.flush()
        assert dict(c) == PLAIN
        c["x"].append(4)
        c["big"].append("end")
    with Chest(path=tmp_path / "c", serializer=serializer) as c:
        assert c["x"] == [1, 2, 3, 4]
        assert c["big"] == PLAIN["big"] + ["end"]
        c.flush()
        assert c.stats().writes == 0
        for key in c:
            with open(c.key_to_filename(key), "rb") as file:
                assert c.load(file) == c[key]


@pytest.mark.parametrize("name", ["safe", "json", "marshal", "cloudpickle", "dill", "joblib"])
def test_a_named_serializer_is_remembered(name: str, tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer=name) as c:
        c["x"] = [1]
    with Chest(path=tmp_path / "c") as c:
        assert c["x"] == [1]
        c["y"] = [2]
    with Chest(path=tmp_path / "c", serializer=name) as c:
        assert dict(c) == {"x": [1], "y": [2]}


def test_another_serializer_is_refused_and_both_are_named(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer="json") as c:
        c["x"] = 1
    with pytest.raises(SerializerMismatchError, match=r"json.*pickle"):
        Chest(path=tmp_path / "c", serializer="pickle")
    with Chest(path=tmp_path / "d", serializer=Repr()) as c:
        c["x"] = 1
    with pytest.raises(SerializerMismatchError, match="Repr"):
        Chest(path=tmp_path / "d")
    with pytest.raises(SerializerMismatchError, match="Repr"):
        Chest(path=tmp_path / "d", serializer="json")
    with Chest(path=tmp_path / "d", serializer=Repr()) as c:
        assert c["x"] == 1


@pytest.mark.parametrize("mode", ["b", "t"])
def test_json_by_pair_is_json_by_name(mode: str, tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", dump=json.dump, load=json.load, mode=mode) as c:
        c["x"] = [1, "é"]
        c.flush()
        with open(c.key_to_filename("x"), encoding="utf-8") as file:
            assert json.load(file) == [1, "é"]
    with Chest(path=tmp_path / "c", serializer="json") as c:
        assert c["x"] == [1, "é"]
    with Chest(path=tmp_path / "c") as c:
        assert c["x"] == [1, "é"]


def test_text_mode_gives_text_to_load(tmp_path: Path) -> None:
    def dump(value: Any, file: Any) -> None:
        file.write(",".join(value))

    def load(file: Any) -> Any:
        return file.read().split(",")

    with Chest(path=tmp_path / "c", dump=dump, load=load, mode="t", available_memory=0) as c:
        c["x"] = ["a", "b\r\n", "ü"]
        c["big"] = ["word"] * 50_000
        assert c["x"] == ["a", "b\r\n", "ü"]
        assert len(c["big"]) == 50_000


def test_a_custom_open_makes_every_value_a_file(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", open=gzip.open) as c:
        c["x"] = [1]
        c["big"] = np.zeros(100_000)
        c.flush()
        with gzip.open(c.key_to_filename("x")) as file:
            assert pickle.load(file) == [1]
        assert (tmp_path / "c" / "big").stat().st_size < 10_000
        assert c["big"].sum() == 0
        c["x"].append(2)
    with Chest(path=tmp_path / "c", open=gzip.open) as c:
        assert c["x"] == [1, 2]


def test_names_of_the_users_own_even_where_they_collide(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", key_to_filename=lambda key: "folder/" + str(key)[0] + ".pkl") as c:
        c["apple"], c["avocado"], c["banana"] = 1, 2, 3
        c.flush()
        assert (tmp_path / "c" / "folder" / "a.pkl").exists()
        assert dict(c) == {"apple": 1, "avocado": 2, "banana": 3}
        del c["apple"]
        c.flush()
        assert dict(c) == {"avocado": 2, "banana": 3}
        with open(c.key_to_filename("avocado"), "rb") as file:
            assert pickle.load(file) == 2


def test_loose_none_makes_every_value_a_file(tmp_path: Path) -> None:
    with Chest({i: i for i in range(5)}, path=tmp_path / "c", loose=None) as c:
        c["word"] = 1
        c.flush()
        assert (tmp_path / "c" / "word").exists()
        assert len([p for p in (tmp_path / "c").iterdir() if p.is_file()]) == 6


def test_few_small_values_have_copies_and_many_are_packed(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c") as c:
        c["a"], c["b"] = 1, [2]
        c.flush()
        assert pickle.loads((tmp_path / "c" / "b").read_bytes()) == [2]
        c["b"].append(3)
        c.flush()
        assert pickle.loads((tmp_path / "c" / "b").read_bytes()) == [2, 3]
        del c["a"]
        c.flush()
        assert not (tmp_path / "c" / "a").exists()
        for i in range(1_000):
            c[f"k{i}"] = i
        c.flush()
        assert len(list((tmp_path / "c").iterdir())) == 101  # 100 copies and .keys
        assert not (tmp_path / "c" / "k999").exists()
        assert pickle.loads(Path(c.key_to_filename("k999")).read_bytes()) == 999
        c["k999"] = "new"
        assert pickle.loads(Path(c.key_to_filename("k999")).read_bytes()) == "new"
        (tmp_path / "c" / "k5").write_bytes(b"nonsense")  # reading never looks at a copy
        assert c["k5"] == 5
        assert pickle.loads(Path(c.key_to_filename("k5")).read_bytes()) == 5


def test_what_a_serializer_refuses_stays_in_memory_and_the_rest_is_written(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer="json", available_memory=0) as c:
        c["bad"] = {1, 2}
        c["good"] = [1]
        with pytest.raises(SerializeError, match=r"'bad'.*json") as info:
            c.flush()
        assert info.value.key == "bad"
        assert c["bad"] == {1, 2}
        with Chest(path=tmp_path / "c") as other:
            assert dict(other) == {"good": [1]}
        c["bad"] = [1, 2]
    with Chest(path=tmp_path / "c") as c:
        assert dict(c) == {"good": [1], "bad": [1, 2]} or dict(c) == {"bad": [1, 2], "good": [1]}


def test_what_cannot_be_loaded_is_a_load_error_that_names_the_key(tmp_path: Path) -> None:
    def bad(file: Any) -> Any:
        raise KeyError("inside")

    def dump(value: Any, file: Any) -> None:
        file.write(b"x")

    with Chest(path=tmp_path / "c", dump=dump, load=bad, available_memory=0) as c:
        c["x"] = 1
        with pytest.raises(LoadError, match=r"'x'.*KeyError") as info:
            c["x"]
        assert info.value.key == "x"
        with pytest.raises(LoadError):
            c.get("x", "default")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"serializer": "yaml"}, ValueError),
        ({"serializer": 5}, TypeError),
        ({"serializer": "json", "dump": json.dump}, TypeError),
        ({"mode": "x"}, ValueError),
        ({"verify": "maybe"}, ValueError),
        ({"loose": -1}, ValueError),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Chest(**arguments)
