"""The value file: plain pickle for everybody, mapped for us, and never a wrong value out of a damaged one."""

from __future__ import annotations

import array
import copyreg
import datetime
import decimal
import io
import mmap
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from chest import _pickled, _reducers
from chest._pickled import Pickler, dump, dumps, load, probe
from chest._valuefile import CHECKED, Layout, read_footer
from chest.errors import CorruptError, LoadError

np = pytest.importorskip("numpy")

BLOCK = 1 << 20  # of the page cache

N = 20_000  # items of 8 bytes: well above what the pickler copies
ENTRY, TRAILER = 32, 48
MIB = 1 << 20


def module(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def written(value: object, note: bytes = b"") -> tuple[bytes, Layout]:
    file = io.BytesIO()
    layout = dump(value, file, note)
    return file.getvalue(), layout


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def there_and_back(value: object, path: Path) -> Any:
    """Through a mapped file, with all that must hold of every file checked on the way."""
    with open(path, "wb") as file:
        layout = dump(value, file, b"a note")
    # At once: what pandas caches on being read is part of its pickle.
    stream, buffers = probe(value)
    assert stream == layout.stream
    assert [(len(buffer), read_only) for buffer, read_only in buffers] == [p[1:3] for p in layout.payloads]
    assert [xxh3_64_intdigest(buffer) for buffer, _ in buffers] == [p.checksum for p in layout.payloads]
    view = mapped(path)
    assert layout.size == len(view) == path.stat().st_size
    assert read_footer(view) == layout
    assert layout.note == b"a note"
    assert all(payload.offset % 64 == 0 for payload in layout.payloads)
    with open(path, "rb") as file:
        plain = pickle.load(file)
        file.seek(0)
        slow = pickle._Unpickler(file).load()  # type: ignore[attr-defined]
        file.seek(0)
        if layout.size < 4 * MIB:  # it prints all of it
            pickletools.dis(file, out=io.StringIO())
    same(plain, value)
    same(slow, value)
    same(load(path.read_bytes(), verify=True)[0], value)
    loaded, again = load(view, verify=True, digest=layout.digest)
    assert again == layout
    same(loaded, value)
    # numpy itself forgets some things of the arrays that it copies, and torch cannot load some that it dumps.
    with_torch = type(value).__module__.startswith("torch")
    same(pickle.loads(dumps(value)), value if with_torch else pickle.loads(pickle.dumps(value, 5)))
    return loaded


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.flags.writeable == expected.flags.writeable
        if expected.flags.forc:
            assert found.flags.f_contiguous == expected.flags.f_contiguous
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif type(expected).__module__.startswith("pandas") or type(expected).__module__.startswith("polars"):
        assert found.equals(expected)
        assert str(getattr(found, "dtypes", "")) == str(getattr(expected, "dtypes", ""))
    elif type(expected).__module__.startswith("torch"):
        torch = module("torch")
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    else:
        assert found == expected


def shares(value: Any, view: mmap.mmap) -> bool:
    return bool(np.shares_memory(np.asarray(value), np.frombuffer(view, "u1")))


# --- round trips

NUMERIC = ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "g", "F", "D", "G", ">f8", ">i4"]
DTYPES = [*NUMERIC, "S5", "U3", "V7", "M8[ns]", ">M8[us]", "m8[s]"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_type_come_back_mapped_and_as_they_were(dtype: str, tmp_path: Path) -> None:
    size = np.dtype(dtype).itemsize
    numbers = np.arange(N * 8 // size // 4 * 4) % 1000
    flat = numbers.astype("S7").view(dtype) if dtype == "V7" else numbers.astype(dtype)
    for value in (flat, np.asfortranarray(flat.reshape(4, -1))):
        there_and_back(value, tmp_path / "x")
        view = mapped(tmp_path / "x")
        assert shares(load(view)[0], view)


def record_arrays() -> list[Any]:
    plain = np.zeros(N, [("a", "i4"), ("b", "f8")])
    plain["a"] = range(N)
    dates = np.zeros(N, [("a", "M8[s]"), ("b", "f8", 2)])
    dates["a"] = np.arange(N)
    mixed = np.zeros(N, [("a", "M8[s]"), ("b", object)])
    mixed["b"] = [(1, 2)] * N
    return [plain, dates, mixed]


def texts() -> Any:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("this numpy has no text of any length")
    return np.array(["x" * (i % 50) for i in range(N)], dtype=np.dtypes.StringDType())


ARRAYS: dict[str, Callable[[], Any]] = {
    "no dimension": lambda: np.array(3.5),
    "no items": lambda: np.zeros((0, 3)),
    "no item of no bytes": lambda: np.zeros(5, "S0"),
    "strided": lambda: np.arange(4.0 * N)[::3],
    "reversed": lambda: np.arange(4.0 * N)[::-1],
    "axes in another order": lambda: np.arange(64.0**3).reshape(64, 64, 64).transpose(1, 0, 2),
    "broadcast": lambda: np.broadcast_to(np.arange(100.0), (1000, 100)),
    "strided dates": lambda: np.arange(4 * N).astype("M8[D]")[::2],
    "Fortran dates": lambda: np.asfortranarray(np.arange(4 * N).astype("M8[D]").reshape(4, -1)),
    "objects": lambda: np.array(["x", None, (1, 2)] * N, dtype=object),
    "records": record_arrays,
    "texts": texts,
    "just below": lambda: np.zeros((1 << 16) - 1, "u1"),
    "just enough": lambda: np.zeros(1 << 16, "u1"),
    "just above": lambda: np.zeros((1 << 16) + 1, "u1"),
    "nested": lambda: {"a": [np.arange(N * 1.0), {"b": (np.arange(N), "text", b"x" * 100_000)}], "c": np.ones(N)},
    "list of many": lambda: [np.full(10_000 + i, i, "f8") for i in range(100)],
    "subclass": lambda: OrderedDict(a=np.ma.masked_array(np.arange(N), mask=np.arange(N) % 2 == 0).data),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_shape_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    there_and_back(ARRAYS[name](), tmp_path / "x")


def test_a_read_only_array_is_read_only_again_even_if_it_was_strided(tmp_path: Path) -> None:
    values = [
        np.arange(N * 1.0),
        np.arange(2.0 * N)[::2],
        np.arange(N).astype("M8[s]"),
        np.arange(2 * N).astype("M8[s]")[::2],
    ]
    for value in values:
        value.flags.writeable = False
    loaded = there_and_back(values, tmp_path / "x")
    assert not any(value.flags.writeable for value in loaded)
    assert len(load(mapped(tmp_path / "x"))[1].payloads) == len(values)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "size", [0, 1, 255, 256, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, MIB, pytest.param(20 * MIB, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", [bytes, bytearray, str, "wide", array.array])
def test_plain_buffers_of_every_size_keep_their_type(kind: Any, size: int, tmp_path: Path) -> None:
    value: Any
    if kind is str:
        value = "x" * size
    elif kind == "wide":
        value = "\u00e9\U0001f600"[: size % 3] + "\u20ac" * (size // 3) + "\ud800"[: size % 2]  # a lone surrogate, too
    elif kind is array.array:
        value = array.array("B", bytes(size))
    else:
        value = kind(random.Random(size).randbytes(size))
    there_and_back(value, tmp_path / "x")
    there_and_back([value, np.arange(N), value, (value[:-1], np.ones(N))], tmp_path / "x")


class Holder:
    """Pickles the way that protocol 5 teaches."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holder) and bytes(self.data) == bytes(other.data)

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Holder, (pickle.PickleBuffer(self.data),)


@pytest.mark.parametrize("data", [bytearray(100_000), b"x" * 100_000, bytearray(10), b""])
def test_classes_with_buffers_of_their_own_come_back(data: Any, tmp_path: Path) -> None:
    there_and_back([Holder(data), Holder(data)], tmp_path / "x")
    view = mapped(tmp_path / "x")
    loaded, layout = load(view)
    assert layout is not None
    assert len(layout.payloads) == (2 if len(data) > 1000 else 0)
    if layout.payloads:
        assert shares(np.frombuffer(loaded[0].data, "u1"), view)
        assert memoryview(loaded[0].data).readonly == isinstance(data, bytes)


def pandas_values() -> dict[str, Any]:
    pd = module("pandas")
    n = N // 2 * 2
    frame = pd.DataFrame(
        {
            "f": np.arange(n * 1.0),
            "i": range(n),
            "text": [f"text {i}" for i in range(n)],
            "category": pd.Categorical(["a", "b"] * (n // 2)),
            "date": np.arange(n).astype("M8[s]"),
            "zone": pd.date_range("2000", periods=n, tz="Europe/Berlin", freq="min"),
            "delta": pd.to_timedelta(np.arange(n)),
            "nullable": pd.array([1, None] * (n // 2), dtype="Int64"),
            "object": [None, (1,)] * (n // 2),
        }
    )
    return {
        "frame": frame,
        "by date": frame.set_index("date"),
        "by two": frame.set_index(["i", "text"]),
        "series": frame["f"],
        "some rows": frame[::3],
        "some columns": frame[["f", "delta"]],
        "transposed": frame[["f", "i"]].T,
        "empty": frame[:0],
        "index": frame.set_index("date").index,
    }


@pytest.mark.parametrize(
    "name",
    ["frame", "by date", "by two", "series", "some rows", "some columns", "transposed", "empty", "index"],
)
def test_pandas_comes_back(name: str, tmp_path: Path) -> None:
    value = pandas_values()[name]
    loaded = there_and_back(value, tmp_path / "x")
    view = mapped(tmp_path / "x")
    if name == "frame":
        loaded = load(view)[0]
        for column in ("f", "i", "date", "zone", "delta"):
            assert shares(loaded[column].array._ndarray, view), column
        loaded.loc[3, "f"] = 7.0
        assert loaded["f"][3] == 7.0


def test_arrow_comes_back_mapped(tmp_path: Path) -> None:
    pa = module("pyarrow")
    table = pa.table({"f": np.arange(N * 1.0), "text": [f"text {i}" for i in range(N)], "list": [[i] for i in range(N)]})
    for value in (table, table.to_batches()[0], table["text"], table["f"].chunk(0), pa.concat_tables([table, table])):
        there_and_back(value, tmp_path / "x")
    there_and_back(table, tmp_path / "x")
    view = mapped(tmp_path / "x")
    loaded = load(view)[0]
    assert shares(loaded["f"].chunk(0).to_numpy(), view)
    assert shares(np.frombuffer(loaded["text"].chunk(0).buffers()[2], "u1"), view)


def polars_values() -> dict[str, Any]:
    pl = module("polars")
    n = N
    columns = {
        "i": pl.Series(range(n)),
        "f": pl.Series(np.arange(n * 1.0)),
        "bool": pl.Series([True, False] * (n // 2)),
        "text": pl.Series([f"some longer text {i}" for i in range(n)]),
        "some text": pl.Series([None, "x", ""] * n)[:n],
        "some": pl.Series([None, 1] * (n // 2)),
        "bytes": pl.Series([b"x", b"y" * 20] * (n // 2)),
        "date": pl.Series([datetime.date(2020, 1, 1)] * n),
        "ms": pl.Series([datetime.datetime(2020, 1, 1)] * n).cast(pl.Datetime("ms")),
        "zone": pl.Series([datetime.datetime(2020, 1, 1)] * n).dt.replace_time_zone("Europe/Berlin"),
        "delta": pl.Series([datetime.timedelta(1)] * n),
        "time": pl.Series([datetime.time(1)] * n),
        "category": pl.Series(["a", "b"] * (n // 2), dtype=pl.Categorical),
        "enum": pl.Series(["a", "b"] * (n // 2), dtype=pl.Enum(["b", "a", "c"])),
        "decimal": pl.Series([decimal.Decimal("1.23")] * n),
        "list": pl.Series([["a", "b"], ["c"]] * (n // 2)),
        "array": pl.Series([[1, 2], [3, 4]] * (n // 2), dtype=pl.Array(pl.Int64, 2)),
        "struct": pl.Series([{"a": 1, "b": "x"}] * n),
        "null": pl.Series([None] * n),
        "wide": pl.Series(range(n), dtype=pl.Int128),
    }
    return {name: series.alias(name) for name, series in columns.items()}


def test_polars_comes_back_with_its_types_and_names(tmp_path: Path) -> None:
    pl = module("polars")
    columns = polars_values()
    for name, series in columns.items():
        loaded = there_and_back(series, tmp_path / "x")
        assert (loaded.name, loaded.dtype) == (name, series.dtype)
        loaded = there_and_back(series.to_frame(), tmp_path / "x")
        assert loaded.schema == series.to_frame().schema
    frame = pl.DataFrame(list(columns.values()))
    values = [frame, frame.drop("wide"), frame[:0], frame[5:5000], frame[5:-5], frame.filter(pl.col("i") % 7 == 0)]
    for value in [*values, pl.concat([frame.drop("wide")] * 2, rechunk=False)]:
        loaded = there_and_back(value, tmp_path / "x")
        assert loaded.schema == value.schema


def test_polars_is_mapped_and_stays_private(tmp_path: Path) -> None:
    pl = module("polars")
    module("pyarrow")
    frame = pl.DataFrame({"f": np.arange(N * 1.0), "text": [f"some longer text {i}" for i in range(N)]})
    there_and_back(frame, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    view = mapped(tmp_path / "x")
    loaded, layout = load(view)
    assert layout is not None
    assert sum(payload.length for payload in layout.payloads) > 0.8 * layout.size
    assert shares(loaded["f"].to_numpy(allow_copy=False), view)
    loaded[0, "f"] = 7.0
    assert loaded["f"][0] == 7.0
    assert frame["f"][0] == 0.0
    assert (tmp_path / "x").read_bytes() == before


def test_a_polars_series_is_mapped(tmp_path: Path) -> None:
    pl = module("polars")
    module("pyarrow")
    there_and_back(pl.Series("x", np.arange(N * 1.0)), tmp_path / "x")
    view = mapped(tmp_path / "x")
    assert shares(load(view)[0].to_numpy(allow_copy=False), view)


def test_a_slice_of_a_polars_frame_does_not_take_the_whole_frame_along() -> None:
    pl = module("polars")
    module("pyarrow")
    frame = pl.DataFrame({"f": np.arange(20.0 * N), "text": [f"some longer text {i}" for i in range(20 * N)]})
    assert written(frame)[1].size > 40 * 20 * N
    for value in (frame[:N], frame["f"][:N], frame["text"][:N], frame.filter(pl.col("f") < N)):
        assert written(value)[1].size < 80 * N
        assert load(written(value)[0])[0].equals(value)


def test_polars_without_arrow_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pl = module("polars")
    monkeypatch.setattr(pl.DataFrame, "to_arrow", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(pl.Series, "to_arrow", lambda *args, **options: 1 / 0)
    frame = pl.DataFrame({"f": np.arange(N * 1.0)})
    there_and_back([frame, frame["f"]], tmp_path / "x")


TORCH = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("dtype", TORCH)
def test_tensors_come_back_mapped(dtype: str, tmp_path: Path) -> None:
    torch = module("torch")
    tensor = torch.arange(4 * N).reshape(4, N).to(getattr(torch, dtype))
    there_and_back(tensor, tmp_path / "x")
    view = mapped(tmp_path / "x")
    loaded = load(view)[0]
    assert shares(loaded.view(torch.uint8).numpy(), view)
    loaded[0, 0] = 1
    assert probe(tensor)[0] == probe(loaded)[0]


def test_tensors_pickle_alike_and_small(tmp_path: Path) -> None:
    torch = module("torch")
    for tensor in (torch.tensor(3.0), torch.zeros(0, 3), torch.arange(5), torch.ones(3, dtype=torch.bfloat16)):
        assert dumps(tensor) == dumps(tensor.clone())
        assert len(dumps(tensor)) < 400
        loaded = pickle.loads(dumps(tensor))
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
    assert b"torch._C" not in dumps(torch.ones(3, dtype=torch.bfloat16))  # private places do not last


def test_tensors_with_more_to_them_are_left_to_torch(tmp_path: Path) -> None:
    torch = module("torch")
    named = torch.arange(N * 1.0)
    named.note = "mine"
    values = [torch.arange(N * 2.0)[::2], torch.randn(4, N, dtype=torch.complex64).conj(), named]
    values += [torch.arange(N * 1.0).requires_grad_(), torch.eye(300).to_sparse(), torch.nn.Parameter(torch.ones(N))]
    for value in values:
        loaded = load(written(value)[0])[0]
        assert type(loaded) is type(value)
        assert (loaded.requires_grad, loaded.layout) == (value.requires_grad, value.layout)
        assert torch.equal(loaded.to_dense(), value.to_dense())
    assert load(written(named)[0])[0].note == "mine"
    assert len(written(torch.nn.Linear(200, 200))[1].payloads) == 1


def test_who_subclasses_or_registers_keeps_his_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = np.ma.masked_array(np.arange(N), mask=np.arange(N) % 2 == 0)
    loaded = load(written(masked)[0])[0]
    assert isinstance(loaded, np.ma.MaskedArray)
    assert (loaded.mask == masked.mask).all()
    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, lambda value: (str, ("mine",)))
    assert load(written(np.arange(N))[0])[0] == "mine"
    assert pickle.loads(dumps(np.arange(3))) == "mine"


def test_half_imported_packages_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "polars", "torch"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    assert _reducers.table() is None
    assert load(written([1, 2])[0])[0] == [1, 2]


def test_the_same_array_twice_is_one_array_again(tmp_path: Path) -> None:
    one = np.arange(N * 1.0)
    dates = one.astype("M8[s]")
    loaded = there_and_back([one, dates, {"again": one}, dates, one], tmp_path / "x")
    assert loaded[0] is loaded[2]["again"] is loaded[4]
    assert loaded[1] is loaded[3]
    loaded[0][0] = 7
    assert loaded[4][0] == 7


# --- the file


def test_plain_pickle_reads_it_where_there_is_no_chest(tmp_path: Path) -> None:
    value: dict[str, Any] = {"numpy": np.arange(N * 1.0), "dates": np.arange(N).astype("M8[s]")}
    for name in ("pandas", "polars"):
        try:
            package = __import__(name)
        except ImportError:
            continue
        value[name] = package.DataFrame({"f": np.arange(N * 1.0)})
    with open(tmp_path / "x", "wb") as file:
        dump(value, file)
    program = (
        "import sys, pickle; sys.modules['chest'] = None; value = pickle.load(open(sys.argv[1], 'rb')); "
        "assert all(float(v[7]) == 7 if k == 'numpy' else len(v) == 20000 for k, v in value.items()); print(len(value))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(value))


@pytest.mark.parametrize("start", range(64))
def test_payloads_are_aligned_whatever_stands_before_them(start: int, tmp_path: Path) -> None:
    value = ["x" * start, np.arange(N), bytes(start), np.ones(N)]
    data, layout = written(value)
    assert len(layout.payloads) == 2
    assert all(payload.offset % 64 == 0 for payload in layout.payloads)
    same(pickle.loads(data), value)
    same(load(data)[0], value)


def test_changes_of_a_mapped_value_stay_private(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with open(path, "wb") as file:
        dump({"a": np.arange(N * 1.0)}, file)
    before = path.read_bytes()
    view = mapped(path)
    loaded = load(view)[0]
    assert loaded["a"].flags.writeable
    assert shares(loaded["a"], view)
    loaded["a"] += 1
    assert path.read_bytes() == before
    same(load(mapped(path), verify=True)[0]["a"], np.arange(N * 1.0))


def test_what_was_writable_is_writable_again_from_read_only_data() -> None:
    frozen = np.arange(N)
    frozen.flags.writeable = False
    data, _ = written([np.arange(N * 1.0), frozen])
    loaded, _ = load(data)
    loaded[0][0] = 7  # a copy: bytes cannot change
    assert load(data, verify=True)[0][0][0] == 0
    assert np.shares_memory(loaded[1], np.frombuffer(data, "u1"))


def test_views_of_any_kind_can_be_loaded_from() -> None:
    data, layout = written(np.arange(N))
    for view in (bytearray(data), memoryview(data), memoryview(data).cast("b"), np.frombuffer(data, "u1").data):
        same(load(view)[0], np.arange(N))
        assert read_footer(view) == layout


def test_a_plain_pickle_is_loaded_as_it_is() -> None:
    for protocol in range(6):
        data = pickle.dumps({"a": [1, 2.5, "x" * 100]}, protocol)
        assert load(data) == ({"a": [1, 2.5, "x" * 100]}, None)
        assert read_footer(data) is None
        with pytest.raises(CorruptError, match="footer is missing"):
            load(data, digest=1)
    with pytest.raises(LoadError):
        load(b"no pickle at all")
    with pytest.raises(LoadError):
        load(b"")


class Dribble(io.RawIOBase):
    """Takes some of what it is given, and keeps it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.data = bytearray()

    def write(self, data: Any) -> int:
        n = min(len(data), self.random.choice([1, 7, 5000, 10**6, 10**9]))
        self.data += data[:n]
        return n


@pytest.mark.parametrize(
    "value", [np.arange(3_000_000.0), [np.arange(700_000.0)] * 3, bytes(5_000_001)], ids=["array", "some", "bytes"]
)
def test_large_buffers_are_written_in_parts_that_begin_at_multiples_of_a_large_block(value: Any) -> None:
    file, starts = io.BytesIO(), []

    class Noting:
        def write(self, data: Any) -> int:
            if file.tell() and len(memoryview(data).cast("B")) > BLOCK // 2:
                starts.append(file.tell() % BLOCK)
            return file.write(data)

    dump(value, Noting())
    assert starts.count(0) >= len(starts) - (3 if isinstance(value, list) else 1), "but for where a buffer begins"
    assert load(file.getvalue())[0] is not None


def test_files_that_write_short_get_all_of_it() -> None:
    value = [np.arange(10 * N), "x" * 300_000, bytearray(3 * MIB)]
    for seed in range(20):
        file = Dribble(seed)
        layout = dump(value, file, b"note")
        assert len(file.data) == layout.size
        same(load(file.data, verify=True)[0], value)
        same(pickle.loads(file.data), value)


class Answers:
    """A file whose ``write`` answers what it is told to."""

    def __init__(self, answer: Callable[[Any], int | None]) -> None:
        self.answer = answer
        self.data = bytearray()

    def write(self, data: Any) -> int | None:
        self.data += data
        return self.answer(data)


def test_a_file_that_answers_none_has_taken_all() -> None:
    file = Answers(lambda data: None)
    dump(np.arange(N), file)
    same(load(file.data)[0], np.arange(N))


@pytest.mark.parametrize("answer", [lambda data: 0, lambda data: len(data) + 1, lambda data: -1])
def test_a_file_that_takes_nothing_or_too_much_is_an_error(answer: Callable[[Any], int]) -> None:
    with pytest.raises(OSError, match="took"):
        dump(np.arange(N), Answers(answer))


def test_what_raises_while_pickling_or_writing_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        dump(np.arange(N), Answers(lambda data: 1 // 0))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        dump(lambda: None, io.BytesIO())
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        dump(deep, io.BytesIO())


class Restless:
    """A file that changes the array while it is being written."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.data = bytearray()

    def write(self, data: Any) -> None:
        raw = memoryview(self.value).cast("B")
        raw[:] = bytes([raw[0] ^ 255]) * len(raw)
        self.data += data


@pytest.mark.parametrize("value", [np.arange(N), bytearray(b"x" * 200_000), bytearray(b"x" * 3 * MIB)])
def test_a_value_that_changes_while_it_is_written_makes_no_file_that_fails_its_checks(value: Any) -> None:
    file = Restless(value)
    dump([value], file)
    load(file.data, verify=True)


# --- memory


def peak(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_writing_takes_no_memory_for_buffers(tmp_path: Path) -> None:
    values = [np.ones(4 * MIB), np.ones((2048, 2048), order="F"), np.ones(4 * MIB).view("M8[s]")]
    for value in [*values, bytearray(32 * MIB), bytes(32 * MIB)]:
        with open(tmp_path / "x", "wb", buffering=0) as file:
            assert peak(lambda value=value, file=file: dump(value, file)) < 2.5 * MIB  # type: ignore[misc]


def test_large_text_and_bytes_are_copied_once_on_loading(tmp_path: Path) -> None:
    for text in (bytes(32 * MIB), "x" * (32 * MIB)):
        for value in (text, [text, np.arange(N)]):
            with open(tmp_path / "x", "wb") as file:
                dump(value, file)
            view = mapped(tmp_path / "x")
            assert 32 * MIB <= peak(lambda view=view: load(view)) < 33 * MIB  # type: ignore[misc]


def test_loading_a_mapped_array_takes_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        dump([np.ones(4 * MIB), bytes(10)], file)
    view = mapped(tmp_path / "x")
    assert peak(lambda: load(view)) < MIB


# --- has it changed?


def test_probe_tells_every_change() -> None:
    value = {"a": np.arange(N * 1.0), "b": [1, 2], "c": bytearray(100_000)}
    _, layout = written(value)

    def unchanged() -> bool:
        stream, buffers = probe(value)
        return stream == layout.stream and [xxh3_64_intdigest(b) for b, _ in buffers] == [p.checksum for p in layout.payloads]

    assert unchanged()
    value["a"][5] = -1
    assert not unchanged()
    value["a"][5] = 5
    assert unchanged()
    value["b"].append(3)
    assert not unchanged()
    value["b"].pop()
    value["c"][77_777] = 1
    assert not unchanged()
    value["c"][77_777] = 0
    assert unchanged()
    value["a"].flags.writeable = False
    assert not unchanged()


def test_probe_gives_the_memory_of_the_value_itself() -> None:
    value = np.arange(N)
    ((buffer, read_only),) = probe([value])[1]
    assert not read_only
    assert np.shares_memory(np.frombuffer(buffer, "u1"), value)


@pytest.mark.parametrize("name", ["numpy", "pandas", "pyarrow", "polars", "torch"])
def test_a_value_that_was_loaded_pickles_alike_each_time(name: str) -> None:
    package = module(name)
    columns = {"f": np.arange(N * 1.0), "text": [f"some longer text {i}" for i in range(N)]}
    value = {
        "numpy": lambda: [np.arange(N), np.arange(N).astype("M8[s]")[::2], {"x": 1}],
        "pandas": lambda: pandas_values()["frame"],
        "pyarrow": lambda: package.table(columns),
        "polars": lambda: package.concat([package.DataFrame(columns)] * 2, rechunk=False)[5:-5],
        "torch": lambda: [package.arange(N), package.nn.Linear(200, 200).state_dict()],
    }[name]()
    data, layout = written(value)
    first, second = (probe(load(bytearray(data))[0]) for _ in range(2))
    assert first[0] == second[0]
    assert len(first[1]) == len(second[1]) == len(layout.payloads)


def test_pickler_and_dumps_write_what_plain_pickle_would() -> None:
    for value in (1, "x", [1, {"a": (None, b"x")}], np.arange(5), datetime.date(2020, 1, 1)):
        file = io.BytesIO()
        Pickler(file).dump(value)
        assert file.getvalue() == dumps(value) == pickle.dumps(value, 5)


# --- damage

Damaged = tuple[bytes, Layout, Any]


def small_file() -> Damaged:
    value = {"a": [1, 2.5, None], "b": "text", "c": b"bytes", "d": (True, 10**20)}
    return *written(value, b"note"), value


def file_with_arrays() -> Damaged:
    value = {"a": np.arange(9000.0), "b": "text", "c": np.zeros(9000, "M8[s]"), "d": bytes(100)}
    return *written(value, b"note"), value


def attempt(data: bytes | bytearray, digest: int | None) -> Any:
    """What a damaged file gives where it gives anything."""
    try:
        return load(data, verify=True, digest=digest)[0]
    except LoadError:  # CorruptError is one
        return None


def test_no_flipped_bit_gives_a_wrong_value() -> None:
    data, layout, _ = small_file()
    for at in range(len(data)):
        for bit in range(8):
            mutated = bytearray(data)
            mutated[at] ^= 1 << bit
            assert attempt(mutated, None) is attempt(mutated, layout.digest) is None, (at, bit)


def test_no_flipped_bit_around_or_in_payloads_gives_a_wrong_value() -> None:
    data, layout, _ = file_with_arrays()
    inside = {at for p in layout.payloads for at in range(p.offset, p.offset + p.length)}
    assert len(layout.payloads) == 2
    chosen = [*(at for at in range(len(data)) if at not in inside), *random.Random(0).sample(sorted(inside), 500)]
    mutated = bytearray(data)
    for at in chosen:
        mutated[at] ^= 1 << at % 8
        with pytest.raises(CorruptError):
            load(bytes(mutated))
        mutated[at] = data[at]


def test_no_cut_and_no_addition_gives_a_wrong_value() -> None:
    data, layout, _ = small_file()
    for n in range(len(data)):
        assert attempt(data[:n], None) is attempt(data[:n], layout.digest) is None, n
    assert attempt(data + b"\0", None) is None
    data, layout, _ = file_with_arrays()
    for n in random.Random(0).sample(range(len(data)), 300):
        assert attempt(data[:n], None) is attempt(data[:n], layout.digest) is None, n
    with pytest.raises(CorruptError):
        load(data[:-1])
    with pytest.raises(CorruptError):
        load(data + data)


def test_no_run_of_random_mutations_gives_a_wrong_value() -> None:
    rng = random.Random(0)
    files = [small_file(), file_with_arrays()]
    for _ in range(2000):
        data, layout, _ = rng.choice(files)
        mutated = bytearray(data)
        n_faults = rng.choice([1, 1, 2, 5])
        for _ in range(n_faults):
            start = rng.choice([rng.randrange(len(mutated)), rng.randrange(200), -rng.randrange(1, 200)]) % len(mutated)
            n = rng.choice([0, 1, 8, 64, 4096])
            put = rng.choice([b"", bytes(n), b"\xff" * n, rng.randbytes(n), bytes(mutated[: rng.randrange(200)])])
            mutated[start : start + n] = put
            if not mutated:
                break
        if mutated != data:
            assert attempt(mutated, layout.digest) is None
            # Without a digest, two faults can make it a pickle that never had a footer.
            loaded = attempt(mutated, None)
            if loaded is not None:
                assert n_faults > 1


def test_the_file_of_another_value_is_told_apart() -> None:
    data, layout = written([1, 2])
    other, other_layout = written([1, 3])
    assert layout.digest != other_layout.digest
    assert written([1, 2], b"other note")[1].digest != layout.digest
    with pytest.raises(CorruptError, match="another value"):
        load(other, digest=layout.digest)
    changed = np.arange(N)
    changed[-1] = 0
    assert written(np.arange(N))[1].digest != written(changed)[1].digest
    assert written(np.arange(N))[1].stream == written(changed)[1].stream
    assert data != other


def test_large_payloads_are_verified_when_asked_and_small_ones_always() -> None:
    for size, always in ((CHECKED // 8, True), (CHECKED // 8 + 1, False)):
        data, layout = written(np.zeros(size))
        mutated = bytearray(data)
        mutated[layout.payloads[0].offset + 1000] = 1
        with pytest.raises(CorruptError, match="checksum"):
            load(mutated, verify=True)
        if always:
            with pytest.raises(CorruptError, match="checksum"):
                load(mutated)
        else:
            assert load(mutated)[0].any()
    data, _ = written(bytes(3 * MIB))
    mutated = bytearray(data)
    mutated[MIB] = 1
    with pytest.raises(CorruptError, match="checksum"):
        load(mutated)


class Gone:
    pass


def test_a_whole_file_that_cannot_be_unpickled_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (Gone(), [Gone(), np.arange(N)]):
        data, _ = written(value)
        with monkeypatch.context() as patch:
            patch.delattr(sys.modules[__name__], "Gone")
            with pytest.raises(LoadError, match="Gone") as caught:
                load(data)
        assert not isinstance(caught.value, CorruptError)
        assert isinstance(caught.value.__cause__, AttributeError)
        load(data)


def forged(data: bytes, layout: Layout, entries: list[tuple[int, int, int, int, int]] | None = None, **fields: int) -> bytes:
    """The same pickle under a footer whose own checksum is right and whose content is not."""
    end = layout.size - TRAILER - ENTRY * len(layout.payloads) - len(layout.note)
    if entries is None:
        entries = [(p.offset, p.length, p.checksum, p.header, p.read_only) for p in layout.payloads]
    head = {"stream": layout.stream, "end": end, "n_payloads": len(entries), "n_note": len(layout.note), **fields}
    covered = b"".join(struct.pack("<QQQBB6x", *entry) for entry in entries) + layout.note
    covered += struct.pack("<QQQQ", *head.values())
    return data[:end] + covered + struct.pack("<Q", xxh3_64_intdigest(covered)) + b"CHESTv1\n"


def test_the_forger_of_these_tests_knows_the_format() -> None:
    data, layout, _ = file_with_arrays()
    assert forged(data, layout) == data


NUMBERS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 200_000), st.sampled_from([0, 1, 63, 2**31, 2**63, 2**64 - 1]))
ENTRIES = st.tuples(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 255), st.integers(0, 255))


@given(
    entries=st.none() | st.lists(ENTRIES, max_size=4),
    fields=st.dictionaries(st.sampled_from(["stream", "end", "n_payloads", "n_note"]), NUMBERS, max_size=3),
)
def test_forged_footers_are_refused_without_a_crash(
    entries: list[tuple[int, int, int, int, int]] | None, fields: dict[str, int]
) -> None:
    data, layout, _ = file_with_arrays()
    forgery = forged(data, layout, entries, **fields)
    if forgery == data:
        return
    with pytest.raises(CorruptError):
        load(forgery, verify=True)


def test_forged_tables_that_nearly_fit_are_refused() -> None:
    data, layout, _ = file_with_arrays()
    good = [(p.offset, p.length, p.checksum, p.header, p.read_only) for p in layout.payloads]
    (one, two) = good

    def change(entry: tuple[int, ...], **new: int) -> Any:
        return tuple({**dict(zip(("offset", "length", "checksum", "header", "read_only"), entry, strict=True)), **new}.values())

    lies: list[list[Any]] = [
        [two, one],
        [one, one],
        [one, one, two],
        [one],
        [],
        [change(one, offset=one[0] - 64), two],
        [change(one, length=one[1] + 64), two],
        [change(one, length=one[1] - 1), two],
        [change(one, length=two[0] - one[0]), two],
        [change(one, header=5), two],
        [change(one, header=0), two],
        [change(one, header=255), two],
        [change(one, read_only=1), two],
        [change(one, read_only=2), two],
        [change(one, checksum=0), two],
        [change(one, offset=0, length=0), two],
        [one, change(two, length=2**64 - 1)],
        [one, change(two, offset=2**64 - 64)],
    ]
    for lie in lies:
        with pytest.raises(CorruptError):
            load(forged(data, layout, lie))
    for lie in lies[0], lies[1], lies[-2], lies[-1]:  # ranges outside of the pickle are not even listed
        with pytest.raises(CorruptError):
            read_footer(forged(data, layout, lie))


def test_a_forged_count_allocates_nothing() -> None:
    data, layout, _ = file_with_arrays()

    def hopeless() -> None:
        for fields in ({"n_payloads": 2**60}, {"n_note": 2**62}, {"end": 0, "n_payloads": len(data) // ENTRY}):
            with pytest.raises(CorruptError):
                load(forged(data, layout, **fields))

    assert peak(hopeless) < 2 * MIB


def test_the_parts_of_a_file_are_read_as_one() -> None:
    rng = random.Random(0)
    whole = rng.randbytes(5000)
    for _ in range(50):
        cuts = sorted(rng.choices(range(5001), k=20))
        parts = [memoryview(whole)[a:b] for a, b in zip([0, *cuts], [*cuts, 5000], strict=True)]
        file = _pickled._Scattered(parts)
        read = b""
        while len(read) < 5000:
            n = rng.choice([1, 3, 100, 2000])
            if rng.random() < 0.5:
                read += bytes(file.read(n))
            else:
                target = bytearray(n)
                read += target[: file.readinto(memoryview(target))]
        assert read == whole
        assert bytes(file.read(1)) == b""
    with pytest.raises(pickle.UnpicklingError):
        file.readline()
