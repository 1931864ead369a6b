"""Compressed values: they come back as they were, the tools of their formats read them, and forged ones cost no memory."""

from __future__ import annotations

import builtins
import gzip
import json
import multiprocessing
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from xxhash import xxh3_64_digest

from chest import Chest, CorruptError, MissingExtraError, _compression
from chest._compression import FRAME, METHODS, PIECE, Compression, Frames, Sample, inflate
from chest._records import BLOB, KIND, LOOSE, PACKED, Ref

PACKAGES = {"zstd": "backports.zstd" if sys.version_info < (3, 14) else "compression.zstd", "lz4": "lz4", "blosc2": "blosc2"}
NUMBERS = np.arange(300_000)  # 2.4 MB: more than one frame
NOISE = np.random.default_rng(1).random(40_000)
TEXT = "all work and no play " * 20_000
CONTENT: dict[Any, Any] = {
    "numbers": NUMBERS,
    "noise": NOISE,
    "text": TEXT,
    "nested": {"a": [np.zeros(70_000), TEXT], "b": NOISE, "c": np.zeros(30_000, dtype=[("x", "i2"), ("y", "f8")])},
    "small": [f"again and again {n}" for n in range(100)],
    "tiny": [1],
    ("a", 1.5): b"\0" * 500_000,
}


@pytest.fixture(name="method", params=METHODS)
def _method(request: pytest.FixtureRequest) -> str:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return str(request.param)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, (list, dict)):
        items = a.items() if isinstance(a, dict) else enumerate(a)
        return type(a) is type(b) and len(a) == len(b) and all(same(value, b[key]) for key, value in items)
    return type(a) is type(b) and bool(a == b)


def record(chest: Chest[Any, Any], key: Any) -> Any:
    return chest._store.index.get(chest._store.name(key) or b"")


def make(path: Path, content: dict[Any, Any] = CONTENT, **settings: Any) -> None:
    with Chest[Any, Any](path=path, **settings) as chest:
        for key, value in content.items():
            chest[key] = value


# --- round trips


@pytest.mark.parametrize("memory", [None, 0], ids=["all in memory", "all spilled"])
def test_values_come_back_as_they_were_without_saying_how_they_were_written(tmp_path: Path, method: str, memory: Any) -> None:
    make(tmp_path / "c", compression=method, available_memory=memory)
    with Chest[Any, Any](path=tmp_path / "c", available_memory=memory) as chest:
        for key, value in CONTENT.items():
            assert same(chest[key], value)
        assert all(same(value, CONTENT[key]) for key, value in chest.items())
        kinds = {key: record(chest, key).kind for key in CONTENT}
    number = METHODS[method].number
    assert {key: kind >> 2 for key, kind in kinds.items()} == {
        key: 0 if key in ("noise", "tiny") else number for key in CONTENT
    }
    assert kinds["noise"] == BLOB
    assert kinds["tiny"] == LOOSE
    assert kinds["small"] & KIND == LOOSE


def test_levels_and_names_of_methods_are_taken_and_nonsense_is_not(tmp_path: Path) -> None:
    sizes = {}
    text = b"".join(b"%d: %d, and %d\n" % (n, n * n, n % 77) for n in range(20_000))
    for compression in ("zlib", ("gzip", 1), ("gzip", 9)):
        make(tmp_path / str(compression), {"x": text}, compression=compression)
        with Chest[Any, Any](path=tmp_path / str(compression)) as chest:
            assert chest["x"] == text
            sizes[compression] = Ref.unpack(record(chest, "x").body).size
    assert sizes["gzip", 9] < sizes["gzip", 1] == sizes["zlib"]
    for nonsense in ("zip", ("gzip", 10), ("gzip", "1"), ("gzip",), 3, ("lz4", True)):
        with pytest.raises(ValueError, match=r"choose|levels"):
            Chest(path=tmp_path / "nonsense", compression=nonsense)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="open="):
        Chest(path=tmp_path / "nonsense", compression="gzip", open=gzip.open)
    assert not (tmp_path / "nonsense").exists()


def test_values_written_with_different_settings_lie_side_by_side(tmp_path: Path, method: str) -> None:
    for n, compression in enumerate([None, method, "gzip", None]):
        make(
            tmp_path / "c",
            {f"{n}": NUMBERS + n, f"small {n}": [f"{m} times and {n}" for m in range(100)]},
            compression=compression,
        )
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        for n in range(4):
            assert same(chest[f"{n}"], NUMBERS + n)
            assert chest[f"small {n}"] == [f"{m} times and {n}" for m in range(100)]
        chest["1"] = NUMBERS * 2  # plain again
        chest.flush()
        assert record(chest, "1").kind == BLOB
        assert same(chest["1"], NUMBERS * 2)


def test_what_does_not_pay_is_stored_plain_and_mapped(tmp_path: Path, method: str) -> None:
    make(tmp_path / "c", {"noise": NOISE, "zeros": np.zeros(40_000)}, compression=method)
    with Chest[Any, Any](path=tmp_path / "c", available_memory=10**9) as chest:
        mapped = chest._store.load("noise", chest._store.name("noise") or b"")
        private = chest._store.load("zeros", chest._store.name("zeros") or b"")
        assert mapped is not None
        assert private is not None
        assert mapped.baseline.view is not None  # type: ignore[union-attr]
        assert private.baseline.view is None  # type: ignore[union-attr]
        assert pickle.loads(Path(chest.key_to_filename("noise")).read_bytes())[0] == NOISE[0]


def test_the_sample_looks_at_all_buffers_and_weighs_them() -> None:
    gzip_ = Compression(METHODS["gzip"], 1)

    def pays(*buffers: Any, stream: bytes = b"") -> bool:
        sample = Sample(gzip_, stops=False)
        sample.write(stream)
        for buffer in buffers:
            sample.next_buffer(memoryview(buffer).cast("B"), 1)
        return sample.pays()

    noise, zeros = random.Random(0).randbytes(200_000), bytes(10**6)
    assert pays(noise, zeros)
    assert not pays(noise, bytes(30_000))
    assert not pays(*[noise] * 40, bytes(100_000))
    assert not pays(stream=noise)
    assert pays(stream=bytes(100) * 700)
    assert pays(stream=noise[:1000] + bytes(2_000_000))
    assert not pays(stream=bytes(20_000) + noise * 4)


# --- values that were decompressed


def test_arrays_are_writable_and_changes_in_place_are_kept(tmp_path: Path, method: str) -> None:
    make(tmp_path / "c", compression=method)
    with Chest[Any, Any](path=tmp_path / "c", compression=method) as chest:
        held = [chest[key] for key in CONTENT]
        assert held[0].flags.writeable
        assert held[0].ctypes.data % 64 == 0
        del held
        chest.sync()
        assert chest.stats().writes == 0  # what was only read is not written again
        chest["numbers"][7] = -1
        chest["nested"]["a"][0][5] = 2.5
        chest["small"].append("changed")
        chest.flush()
        assert chest.stats().writes == 3
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert chest["numbers"][7] == -1
        assert chest["nested"]["a"][0][5] == 2.5
        assert chest["small"][-1] == "changed"
        assert record(chest, "numbers").kind >> 2 == METHODS[method].number


class Bag:
    """It pickles otherwise once it was loaded, and the same ever after."""

    def __init__(self, made: str) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return _loaded_bag, (self.made,)


def _loaded_bag(made: str) -> Bag:
    return Bag("by loading")


def test_a_value_that_pickles_otherwise_once_it_was_loaded_is_not_taken_for_changed(tmp_path: Path) -> None:
    value = [Bag("by hand"), [1], np.zeros(20_000)]
    make(tmp_path / "c", {"x": value}, compression="gzip")
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        found = chest["x"]
        chest.sync()
        assert chest.stats().writes == 0
        found[2][0] = 1
        chest.sync()
        assert chest.stats().writes == 1
        found[1].append(2)
        chest.sync()
        assert chest.stats().writes == 2


def _write_into(array: Any) -> None:
    array[:] = -1


def test_what_was_decompressed_is_not_shared_with_forked_children(tmp_path: Path) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    make(tmp_path / "c", {"x": NUMBERS}, compression="gzip")
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        value = chest["x"]
        child = multiprocessing.get_context("fork").Process(target=_write_into, args=(value,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert same(value, NUMBERS)


def test_other_serializers_are_compressed_too(tmp_path: Path, method: str) -> None:
    values = {"large": [{"n": n, "text": "x" * 20} for n in range(5000)], "small": [f"number {n}" for n in range(100)]}
    make(tmp_path / "c", values, compression=method, serializer="json")
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert {key: chest[key] for key in values} == values
        assert record(chest, "large").kind == BLOB | METHODS[method].number << 2
        chest["large"][0]["n"] = -5
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert chest["large"][0]["n"] == -5


def test_numbers_in_arrays_are_shuffled_by_blosc2(tmp_path: Path) -> None:
    pytest.importorskip("blosc2")
    steps = np.linspace(0, 1, 200_000)
    make(tmp_path / "b", {"x": steps, "y": [steps.view("u1")]}, compression="blosc2")
    with Chest[Any, Any](path=tmp_path / "b") as chest:
        sizes = [Ref.unpack(record(chest, key).body).size for key in "xy"]
        assert sizes[0] < 0.6 * sizes[1]  # the same bytes, of which blosc2 does not know that they are numbers of eight
        data = Path(chest.key_to_filename("x")).read_bytes()
    sizes = []
    while data:
        (n,) = struct.unpack_from("<i", data, 12)
        sizes.append(data[3])
        data = data[n:]
    assert sizes == [1, 8, 1]


def test_values_taken_over_by_another_chest_keep_how_they_were_written(tmp_path: Path, method: str) -> None:
    make(tmp_path / "c", compression=method)
    with Chest[Any, Any](path=tmp_path / "c") as donor, Chest[Any, Any](path=tmp_path / "d") as taker:
        taker.update(donor)
        for key, value in CONTENT.items():
            assert same(taker[key], value)
            assert record(taker, key).kind >> 2 == record(donor, key).kind >> 2
        file, copy = Path(donor.key_to_filename("numbers")), Path(taker.key_to_filename("numbers"))
        assert file.samefile(copy)


def test_readable_copies_are_plain(tmp_path: Path, method: str) -> None:
    make(tmp_path / "c", {"small": CONTENT["small"]}, compression=method)
    assert pickle.loads((tmp_path / "c" / "small").read_bytes()) == CONTENT["small"]
    with Chest[Any, Any](path=tmp_path / "c", loose=0) as chest:
        (tmp_path / "c" / "small").unlink()
        assert pickle.loads(Path(chest.key_to_filename("small")).read_bytes()) == CONTENT["small"]
        assert record(chest, "small").kind == LOOSE | METHODS[method].number << 2


# --- the tools of the formats


def _lines(name: str) -> str:
    """The documented way to read a value without chest."""
    text = (Path(__file__).parents[1] / "docs" / "explanation" / "compression.md").read_text(encoding="utf-8")
    block = text.split(f"<!-- {name} -->\n")[1].split("```")[1]
    return block.partition("\n")[2]


@pytest.mark.parametrize("tool", ["zstd", "lz4", "gzip"])
def test_the_tool_of_the_format_gives_a_plain_pickle(tmp_path: Path, tool: str) -> None:
    if tool in PACKAGES:
        pytest.importorskip(PACKAGES[tool])
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    make(tmp_path / "c", {"numbers": NUMBERS}, compression=tool)
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        file = chest.key_to_filename("numbers")
    line = (
        _lines(tool)
        .strip()
        .replace("FILE", file)
        .replace("python ", f"{sys.executable} ")
        .replace("print(value)", "print(value.sum())")
    )
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (str(NUMBERS.sum()), "")


def test_a_few_lines_of_python_read_what_blosc2_has_compressed(tmp_path: Path) -> None:
    pytest.importorskip("blosc2")
    make(tmp_path / "c", {"nested": CONTENT["nested"]}, compression="blosc2")
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        file = chest.key_to_filename("nested")
    found: dict[str, Any] = {"FILE": file}
    exec(_lines("blosc2"), found)
    assert same(found["value"], CONTENT["nested"])


# --- damage


def forge(path: Path, name: bytes, change: Callable[[int, bytes], tuple[int, bytes]]) -> None:
    """Change a record as somebody can who knows the format: its checksum is right."""
    env = lmdb.open(str(path / ".keys"), max_dbs=10, lib_version=0)
    try:
        with env.begin(write=True) as txn:
            db = env.open_db(b"index", txn, create=False)
            data = bytes(txn.get(name, db=db))
            kind, body = change(data[16], data[17:-8])
            data = data[:16] + bytes([kind]) + body
            txn.put(name, data + xxh3_64_digest(name + data), db=db)
    finally:
        env.close()


def read(path: Path, key: str) -> Any:
    with Chest[Any, Any](path=path) as chest:
        return chest[key]


@pytest.mark.parametrize("plain", [1, 2_400_000, 3_000_000, 1 << 33, 1 << 62])
def test_a_forged_size_is_damage(tmp_path: Path, method: str, plain: int) -> None:
    make(tmp_path / "c", compression=method)
    forge(tmp_path / "c", b"snumbers", lambda kind, body: (kind, Ref.unpack(body)._replace(plain=plain).pack()))
    with pytest.raises((CorruptError, MemoryError)) as caught:
        read(tmp_path / "c", "numbers")
    if plain == 1 << 62:
        assert "cannot have been" in str(caught.value)
    forge(tmp_path / "c", b"ssmall", lambda kind, body: (kind, struct.pack("<I", plain % (1 << 32)) + body[4:]))
    with pytest.raises(CorruptError, match="'small'"):
        read(tmp_path / "c", "small")


def test_a_bomb_takes_no_more_memory_than_was_recorded(tmp_path: Path, method: str) -> None:
    """Frames that hold 256 MiB behind a record that says 3 MiB."""
    make(tmp_path / "c", compression=method)
    bomb = METHODS[method].compress(bytes(FRAME), METHODS[method].level) * 128
    forge(
        tmp_path / "c", b"snumbers", lambda kind, body: (kind, Ref.unpack(body)._replace(size=len(bomb), plain=3 << 20).pack())
    )
    (tmp_path / "c" / "numbers").write_bytes(bomb)
    read(tmp_path / "c", "tiny")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="holds more"):
            read(tmp_path / "c", "numbers")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_single_frame_that_goes_on_for_ever_is_stopped_in_time(method: str) -> None:
    if method == "blosc2":
        pytest.skip("its chunks say what they hold, and no more than a frame is believed")
    frame = METHODS[method].compress(bytes(200 << 20), METHODS[method].level)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="holds more"):
            inflate(METHODS[method], [memoryview(frame)], 2 << 20, len(frame))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_asks_for_much_memory_is_refused() -> None:
    zstd = pytest.importorskip(PACKAGES["zstd"])
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(bytes(100_000)) + compressor.flush()
    with pytest.raises(CorruptError, match="decompressed"):
        inflate(METHODS["zstd"], [frame], 100_000, len(frame))


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty", "twice"])
def test_a_damaged_file_is_damage(tmp_path: Path, method: str, damage: str) -> None:
    make(tmp_path / "c", compression=method)
    file = tmp_path / "c" / "numbers"
    data = file.read_bytes()
    changed = {
        "cut": data[:-40],
        "flipped": data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
        "other": pickle.dumps(NUMBERS),
        "empty": b"",
        "twice": data + data,
    }[damage]
    file.write_bytes(changed)
    # Whoever knows the format would make the size fit.
    forge(tmp_path / "c", b"snumbers", lambda kind, body: (kind, Ref.unpack(body)._replace(size=len(changed)).pack()))
    with pytest.raises(CorruptError, match=r"'numbers'.*numbers.* is damaged"):
        read(tmp_path / "c", "numbers")


def test_a_method_that_is_not_known_is_said_to_be(tmp_path: Path) -> None:
    make(tmp_path / "c", {"small": CONTENT["small"], "numbers": NUMBERS}, compression="gzip")
    for key in ("small", "numbers"):
        forge(tmp_path / "c", b"s" + key.encode(), lambda kind, body: (kind & KIND | 63 << 2, body))
        with pytest.raises(CorruptError, match="method 63"):
            read(tmp_path / "c", key)


@pytest.mark.parametrize("key", ["numbers", "small"])
def test_a_missing_library_is_named_and_is_no_damage(
    tmp_path: Path, method: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "gzip":
        pytest.skip("it belongs to Python")
    make(tmp_path / "c", compression=method)
    real = builtins.__import__
    root = PACKAGES[method].partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == root]:
        monkeypatch.delitem(sys.modules, name)

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == root:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(_compression.importlib, "import_module", lambda name: without(name))
    _compression._zstd.cache_clear()
    with pytest.raises(MissingExtraError, match=r"chest\[compression\]"):
        read(tmp_path / "c", key)
    with pytest.raises(MissingExtraError, match=r"chest\[compression\]"):
        Chest(path=tmp_path / "c", compression=method)
    assert read(tmp_path / "c", "tiny") == [1]


# --- frames


def test_frames_take_anything_and_give_it_back(method: str) -> None:
    compression = Compression(METHODS[method], METHODS[method].level)
    rng = random.Random(3)
    for _ in range(4):
        out: list[bytes] = []
        plain = b""
        frames = Frames(compression, out.append)
        for _ in range(rng.randrange(6)):
            part = rng.randbytes(rng.choice([1, 100, 70_000])) * rng.choice([1, 7, 40])
            if rng.random() < 0.5:
                frames.next_buffer(len(part), rng.choice([1, 2, 3, 8, 24, 300]))
            for start in range(0, len(part), PIECE):
                frames.write(part[start : start + PIECE])
            plain += part
        frames.close()
        data = b"".join(out)
        for step in (len(data) or 1, 10_000):
            parts = [data[start : start + step] for start in range(0, len(data), step)]
            assert bytes(inflate(METHODS[method], parts, len(plain), len(data))) == plain


@pytest.mark.parametrize("content", [b"\0", bytes(65_535), bytes(20 << 20), b"ab" * (5 << 20)], ids=["1", "64K", "zeros", "ab"])
def test_what_compresses_best_is_within_the_ratio_that_is_believed(method: str, content: bytes) -> None:
    compression = Compression(METHODS[method], METHODS[method].levels[-1] if method == "gzip" else METHODS[method].level)
    out: list[bytes] = []
    frames = Frames(compression, out.append)
    frames.write(content)
    frames.close()
    data = b"".join(out)
    assert inflate(METHODS[method], [data], len(content), len(data)) == content


def test_a_chest_compresses_within_a_few_mib(tmp_path: Path, method: str) -> None:
    values = np.arange(8 << 20)  # 64 MiB
    with Chest[Any, Any](path=tmp_path / "c", compression=method, available_memory=0) as chest:
        chest["first"] = NUMBERS
        chest.flush()
        tracemalloc.start()
        try:
            chest["x"] = values
            chest.flush()
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()
        assert json.dumps(int(chest["x"][-1])) == json.dumps((8 << 20) - 1)
        assert record(chest, "x").kind & KIND == BLOB != PACKED


def test_a_frame_without_its_end_is_cut_short() -> None:
    frame = METHODS["gzip"].compress(b"content" * 100, 1)
    with pytest.raises(CorruptError, match="cut short"):
        inflate(METHODS["gzip"], [frame[:-4]], 700, len(frame))
