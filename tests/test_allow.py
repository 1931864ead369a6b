"""The allow-list: what a pickle may name, in values, files and keys; real exploits stay without effect."""

from __future__ import annotations

import collections
import copyreg
import datetime as dt
import decimal
import enum
import functools
import io
import operator
import os
import pickle
import types
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from chest import Chest, ChestError, KeyTypeError, LoadError, NotAllowedError, _keys, _pickled
from chest.engines._lmdb import LmdbIndex
from chest.serializers import resolve
from chest.serializers._allowed import AllowedPickles

HERE = __name__


class Mine:
    class Inner:
        def __eq__(self, other: object) -> bool:
            return type(other) is Mine.Inner

        __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return type(other) is Mine

    def __hash__(self) -> int:
        return 5


class Colour(enum.Enum):
    RED = "red"


def make_mine() -> Mine:
    return Mine()


FOLDER = ""  # where exploits leave their mark


class Exploit:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def touch() -> str:
    return f"touch {FOLDER}/pwned"


CODE = "__import__('os').system({!r})"


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, qualname: str) -> bytes:
    def text(item: str) -> bytes:
        return b"\x8c" + bytes([len(item)]) + item.encode()

    return text(module) + text(qualname) + b"\x93"


EXPLOITS: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: pickle.dumps(Exploit(os.system, touch())),
    "os.system, text": lambda: b"cos\nsystem\n(S'%b'\ntR." % touch().encode(),
    "subprocess": lambda: opcodes(name("subprocess", "Popen"), b"(]\x8c\x05touch\x94atR"),
    "eval": lambda: pickle.dumps(Exploit(eval, CODE.format(touch()))),
    "exec": lambda: pickle.dumps(Exploit(exec, CODE.format(touch()))),
    "eval of Python 2": lambda: b"c__builtin__\neval\n(S'1'\ntR.",
    "apply of Python 2": lambda: b"c__builtin__\napply\n(cos\nsystem\n(S'true'\nttR.",
    "getattr": lambda: pickle.dumps(Exploit(getattr, uuid.UUID, "__init__")),
    "getattr of what is allowed": lambda: pickle.dumps(Exploit(getattr, Mine, "__init__")),
    "an attribute of an enum's class": lambda: pickle.dumps(Exploit(getattr, Colour, "__class__")),
    "import": lambda: pickle.dumps(Exploit(__import__, "os")),
    "type": lambda: pickle.dumps(Exploit(type, "New", (), {})),
    "open": lambda: pickle.dumps(Exploit(open, os.path.join(FOLDER, "pwned"), "w")),
    "partial": lambda: pickle.dumps(functools.partial(os.system, touch())),
    "partial alone": lambda: pickle.dumps(functools.partial(dict, a=1)),
    "attrgetter": lambda: pickle.dumps(Exploit(operator.attrgetter("__init__.__globals__"), Mine)),
    "methodcaller": lambda: pickle.dumps(operator.methodcaller("system", "true")),
    "itemgetter": lambda: pickle.dumps(operator.itemgetter("os")),
    "map": lambda: opcodes(name("builtins", "map")),
    "a dotted name through a module": lambda: opcodes(name(HERE, "os.system")),
    "a dotted name through a class": lambda: opcodes(name("collections", "OrderedDict.fromkeys.__self__")),
    "a dotted name out of a class": lambda: opcodes(name(HERE, "Mine.__init__.__globals__")),
    "a module": lambda: opcodes(name(HERE, "os")),
    "a function of the module": lambda: opcodes(name(HERE, "touch")),
    "what the module has imported": lambda: opcodes(name(HERE, "Path")),
    "a class by its state": lambda: b"(i__main__\nMissing\n.",
    "INST": lambda: b"(S'true'\nios\nsystem\n.",
    "OBJ": lambda: b"(cos\nsystem\nS'true'\no.",
    "a persistent id": lambda: b"Pwned\n.",
    "an extension code": lambda: opcodes(b"\x82\xf0"),
    "a codec": lambda: opcodes(name("_codecs", "encode"), b"\x8c\x01a\x8c\x05bz2_c\x86R"),
    "chest's own": lambda: opcodes(name("chest.serializers._allowed", "_method")),
    "runstring": lambda: opcodes(name("numpy.testing._private.utils", "runstring")),
    "f2py": lambda: opcodes(name("numpy.f2py", "compile")),
    "numpy.load": lambda: opcodes(name("numpy", "load")),
    "numpy.memmap": lambda: opcodes(name("numpy", "memmap")),
    "numpy's os": lambda: opcodes(name("numpy", "f2py.os.system")),
    "pandas.read_pickle": lambda: opcodes(name("pandas", "read_pickle")),
    "pandas.eval": lambda: opcodes(name("pandas", "eval")),
    "pandas' own eval": lambda: opcodes(name("pandas.core.computation.eval", "eval")),
    "a method of a frame": lambda: opcodes(name("pandas", "DataFrame.query")),
    "polars' expressions": lambda: opcodes(name("polars.expr.expr", "Expr")),
}
ALLOW = [f"{HERE}", f"{HERE}.make_mine", "numpy", "pandas", "pyarrow", "polars"]


@pytest.fixture(params=EXPLOITS)
def exploit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    monkeypatch.setattr(f"{HERE}.FOLDER", str(tmp_path))
    copyreg.add_extension("os", "system", 0xF0)
    try:
        if request.param == "an extension code":
            assert pickle.loads(EXPLOITS[request.param]()) is os.system  # from now on it is in a cache
        yield EXPLOITS[request.param]()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not (tmp_path / "pwned").exists()


def codec() -> Any:
    return resolve("pickle", None, None, "b", ALLOW)


def test_an_exploit_is_refused_wherever_it_is_read(exploit: bytes, tmp_path: Path) -> None:
    found = codec()
    reads: list[Callable[[], Any]] = [
        lambda: found.loads(exploit),
        lambda: found.load(io.BytesIO(exploit)),
        lambda: found.files.load(exploit),
        lambda: found.decode(b"h" + bytes(32), exploit),
    ]
    for read in reads:
        with pytest.raises((NotAllowedError, LoadError, pickle.UnpicklingError)):
            read()


def plant(folder: Path, data: bytes) -> None:
    """Put a pickle in the place of the value of "x", as if a chest had written it there."""
    with Chest(path=folder) as c:
        c["x"] = 1
    index = LmdbIndex.open(str(folder / ".keys"), sync=False)
    try:
        record = index.get(b"sx")
        assert record is not None
        index.commit([record_with(record, data)])
    finally:
        index.close()


def record_with(record: Any, data: bytes, typed: bytes = b"", key: bytes = b"sx") -> Any:
    from chest.abc import Put

    return Put(key, record.seq, 0, data, typed, True)


def test_a_refused_value_names_what_it_asked_for_and_what_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.FOLDER", str(tmp_path))
    plant(tmp_path / "c", pickle.dumps([Exploit(os.system, touch())]))
    with Chest(path=tmp_path / "c", allow=[]) as c:
        with pytest.raises(NotAllowedError, match=r"(?s)'x'.*(posix|nt)\.system.*add .*allow=") as info:
            c["x"]
        assert info.value.key == "x"
        with pytest.raises(NotAllowedError):
            c.get("x", "default")
        with pytest.raises(NotAllowedError):
            list(c.values())
    assert not (tmp_path / "pwned").exists()
    with Chest(path=tmp_path / "c", allow=["posix.system", "nt.system"]) as c:
        assert c["x"] == [0]
    assert (tmp_path / "pwned").exists(), "the exploit of this test is none"


def test_a_refused_file_and_a_refused_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.FOLDER", str(tmp_path))
    with Chest(path=tmp_path / "c") as c:
        c["x"] = [Exploit(os.system, touch()), "y" * 100_000]
        c["ok"] = ["y" * 100_000]
    with Chest(path=tmp_path / "c", allow=[]) as c:
        with pytest.raises(NotAllowedError, match="system"):
            c["x"]
        assert c["ok"] == ["y" * 100_000]
    with Chest(path=tmp_path / "k") as c:
        c[Mine()] = 1
        c[True] = 2
    with Chest(path=tmp_path / "k", allow=[]) as c:
        assert c[True] == 2
        with pytest.raises(NotAllowedError, match=f"{HERE}.Mine"):
            list(c)
        with pytest.raises(NotAllowedError):
            c.get(Mine(), 0)
        with pytest.raises((KeyTypeError, NotAllowedError)):
            c[1, Colour.RED] = 3
    with Chest(path=tmp_path / "k", allow=[f"{HERE}.Mine"]) as c:
        assert list(c) == [Mine(), True]
        assert c[Mine()] == 1
    assert not (tmp_path / "pwned").exists()


def test_an_old_folder_is_read_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.FOLDER", str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".keys").write_bytes(pickle.dumps([(Exploit(os.system, touch()), "x")]))
    with pytest.raises(NotAllowedError, match="system"):
        Chest(path=tmp_path / "old", allow=[])
    assert not (tmp_path / "pwned").exists()


STANDARD = [
    *(1 + 2j, {1, 2}, frozenset({1}), range(3), slice(1, 2), bytearray(b"x"), b"x", ..., NotImplemented),
    *(dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), dt.date(2020, 1, 1), dt.time(1), dt.timedelta(1)),
    *(dt.datetime(2020, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")), decimal.Decimal("1.5"), Fraction(1, 3), uuid.UUID(int=3)),
    *(
        collections.OrderedDict(a=1),
        collections.deque([1], 3),
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
    ),
    *(Path("a/b"), types.SimpleNamespace(a=1), uuid.SafeUUID.safe),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", STANDARD, ids=lambda value: type(value).__name__)
def test_harmless_types_need_no_entry(value: Any, protocol: int) -> None:
    found = AllowedPickles([]).loads(pickle.dumps([value], protocol))
    assert found == [value]
    assert type(found[0]) is type(value)


def test_entries_are_exact_names_and_modules_whose_classes_are_meant() -> None:
    values = [Mine(), Mine.Inner(), Colour.RED]
    assert AllowedPickles([HERE]).loads(pickle.dumps(values)) == values
    assert AllowedPickles([f"{HERE}.Mine"]).loads(pickle.dumps(Mine())) == Mine()
    for entries, value in [([f"{HERE}.Mine"], Mine.Inner()), ([f"{HERE}.Mine"], Colour.RED), ([f"{HERE}.Mine.Inner"], Mine())]:
        with pytest.raises(NotAllowedError):
            AllowedPickles(entries).loads(pickle.dumps(value))
    assert AllowedPickles([f"{HERE}.Mine.Inner"]).loads(pickle.dumps(Mine.Inner())) == Mine.Inner()
    assert AllowedPickles([f"{HERE}.make_mine"]).loads(pickle.dumps(make_mine)) is make_mine
    with pytest.raises(NotAllowedError):
        AllowedPickles([f"{HERE}.os", f"{HERE}.os.system"]).loads(opcodes(name(HERE, "os.system")))
    with pytest.raises(NotAllowedError):
        AllowedPickles([f"{HERE}.os"]).loads(opcodes(name(HERE, "os")))


def test_nothing_is_imported_before_it_is_allowed() -> None:
    import sys

    sys.modules.pop("antigravity", None)
    with pytest.raises(NotAllowedError, match="antigravity"):
        AllowedPickles([]).loads(opcodes(name("antigravity", "webbrowser.open")))
    assert "antigravity" not in sys.modules


def test_extension_codes_go_through_the_list() -> None:
    copyreg.add_extension(HERE, "Mine", 0xF1)
    try:
        data = pickle.dumps([Mine(), "a" * 300, b"b" * 300, 2**80])
        assert b"\x82\xf1" in data
        expected = pickle.loads(data)  # and the cache knows it now
        with pytest.raises(NotAllowedError):
            AllowedPickles([]).loads(data)
        allowed = AllowedPickles([HERE])
        assert allowed.loads(data) == expected == allowed.load_file(data)[0]
        file = io.BytesIO()
        _pickled.dump([Mine(), bytearray(100_000), "t" * 100_000], file)
        assert allowed.load_file(file.getvalue())[0] == [Mine(), bytearray(100_000), "t" * 100_000]
    finally:
        copyreg.remove_extension(HERE, "Mine", 0xF1)


@pytest.mark.parametrize("entries", ["numpy", [1], ["a b"], ["a."], [""], ["os;x"]])
def test_nonsense_is_refused_before_a_folder_is_made(entries: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="allow"):
        Chest(path=tmp_path / "c", allow=entries)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("serializer", ["dill", "joblib", "cloudpickle", "marshal"])
def test_a_list_that_a_serializer_would_not_keep_to_is_refused(serializer: str, tmp_path: Path) -> None:
    pytest.importorskip(serializer)
    with pytest.raises(ValueError, match=serializer):
        Chest(allow=[], serializer=serializer)
    with Chest(path=tmp_path / "c", serializer=serializer) as c:
        c["x"] = 1
    with pytest.raises(ValueError, match=serializer):
        Chest(path=tmp_path / "c", allow=[])


def test_the_list_holds_for_json_keys_for_pairs_for_open_and_in_other_processes(tmp_path: Path) -> None:
    import json

    with Chest(path=tmp_path / "j", serializer="json") as c:
        c[Mine()] = 1
    for arguments in ({"serializer": "json"}, {"dump": json.dump, "load": json.load}, {}):
        with Chest(path=tmp_path / "j", allow=[], **arguments) as c, pytest.raises(NotAllowedError):  # type: ignore[arg-type]
            list(c)
    with Chest(path=tmp_path / "o", open=_open) as c:
        c["x"] = Mine()
    for arguments in ({}, {"dump": pickle.dump, "load": pickle.load}):
        with Chest(path=tmp_path / "o", open=_open, allow=[], **arguments) as c, pytest.raises(NotAllowedError):  # type: ignore[arg-type]
            c["x"]
    with Chest(path=tmp_path / "p", allow=[HERE]) as c:
        c["x"] = Mine()
        sent = pickle.loads(pickle.dumps(c))
        with sent:
            assert sent["x"] == Mine()
            assert sent._given["allow"] == [HERE]
    with Chest(path=tmp_path / "p") as c:  # not remembered
        assert c["x"] == Mine()


def _open(path: Any, mode: str = "rb") -> Any:
    return open(path, mode)


def test_large_values_of_numpy_are_mapped_and_changed_in_place(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    with Chest(path=tmp_path / "c", allow=["numpy"], available_memory=0) as c:
        c["a"], c["d"] = np.zeros(100_000), np.arange(100_000).astype("M8[s]")
        c["a"][5] = 7
        c["m"] = {"x": np.ma.array([1, 2], mask=[0, 1]), "s": np.float32(3), "t": [np.dtype("f8"), np.int8]}
    with Chest(path=tmp_path / "c", allow=["numpy"]) as c:
        assert c["a"][5] == 7
        assert c["d"].dtype == "M8[s]"
        assert c["m"]["t"] == [np.dtype("f8"), np.int8]
        c.flush()
        assert c.stats().writes == 0
    with Chest(path=tmp_path / "c", allow=[]) as c, pytest.raises(NotAllowedError, match="'numpy'"):
        c["a"]


def _frames() -> dict[str, Any]:
    pd = pytest.importorskip("pandas")
    t = pd.date_range("2020", periods=3)
    return {
        "plain": pd.DataFrame({"a": [1.0] * 20_000, "s": ["x"] * 20_000, "t": pd.date_range("2020", periods=20_000)}),
        "zone": pd.Series(t.tz_localize("Europe/Berlin")),
        "category": pd.Series(["a", "b"], dtype="category"),
        "integers": pd.Series([1, None], dtype="Int64"),
        "boolean": pd.Series([True, None], dtype="boolean"),
        "text": pd.Series(["a", None], dtype="string"),
        "arrow text": pd.Series(["a", None], dtype="string[pyarrow]"),
        "periods": pd.Series(pd.period_range("2020", periods=3, freq="M")),
        "intervals": pd.Series(pd.interval_range(0, 3)),
        "levels": pd.Series([1, 2], index=pd.MultiIndex.from_tuples([(1, "a"), (2, "b")])),
        "deltas": pd.Series([1, 2, 3], index=t - t[0]),
        "business": pd.Series([1, 2, 3], index=pd.date_range("2020", periods=3, freq="B")),
        "moment": pd.Series([pd.Timestamp("2020"), pd.Timedelta("1s"), pd.NaT, pd.NA, pd.Period("2020"), pd.Interval(0, 1)]),
    }


def test_values_of_pandas_pyarrow_and_polars_come_back(tmp_path: Path) -> None:
    pa, pl = pytest.importorskip("pyarrow"), pytest.importorskip("polars")
    frames = _frames()
    with Chest(path=tmp_path / "c") as c:
        c.update(frames)
        c["arrow"] = pa.table({"a": [1, 2], "s": ["x", None], "l": [[1], [2]], "d": pa.array(["a", "b"]).dictionary_encode()})
        c["polars"] = pl.DataFrame({"a": [1, 2], "s": ["x", None]})
        c["large polars"] = pl.DataFrame({"a": range(20_000), "s": ["text"] * 20_000})
    with Chest(path=tmp_path / "c", allow=["pandas", "polars"]) as c:
        for key, frame in frames.items():
            assert type(c[key]) is type(frame)
            assert c[key].equals(frame), key
        assert c["arrow"].num_rows == 2
        assert c["polars"]["a"].to_list() == [1, 2]
        assert len(c["large polars"]) == 20_000
    with Chest(path=tmp_path / "c", allow=["numpy"]) as c:
        for key in c:
            with pytest.raises(NotAllowedError):
                c[key]


def test_the_default_is_as_it_was() -> None:
    default = resolve("pickle", None, None, "b")
    assert default is not None
    assert default.loads is pickle.loads
    assert default.encode is _keys.encode
    assert issubclass(NotAllowedError, LoadError)
    assert not issubclass(NotAllowedError, KeyError)
    assert isinstance(pickle.loads(pickle.dumps(NotAllowedError("x", key=1))), ChestError)
