"""What fuzzers aim at: the readers of value files, of records, of references and notes, of names, of what the safe
serializer writes, and of pickles that an allow-list bounds.

Each target takes any bytes, and raises if chest does what it must not: another error than a documented one, or a value
without one that is not what was written. Nothing is ever unpickled without an allow-list, for arbitrary pickles run arbitrary
code: the unpickler is replaced by one that only looks at what has come through to it.

As a script, with the package atheris, a run that is guided by coverage:

    python fuzz.py TARGET [option of libFuzzer, or folder with inputs] ...
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import pickle
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from pickle import PickleBuffer
from typing import Any
from unittest import mock
from uuid import UUID

from xxhash import xxh3_64_digest, xxh3_64_intdigest

if __name__ == "__main__":
    atheris: Any = importlib.import_module("atheris")  # which few have installed
    with atheris.instrument_imports(include=["chest"]):
        import chest  # noqa: F401

from chest import _keys, _pickled, _valuefile
from chest._compression import METHODS, Compression, private_memory
from chest._envelope import Envelope, open_body, open_file
from chest._records import Ref, pack_note, unpack_note
from chest._sealing import RECORD, Seal
from chest.abc import Put, Record
from chest.engines._lmdb import LmdbIndex
from chest.errors import CorruptError, LoadError, TamperedError
from chest.serializers._allowed import AllowedPickles

Target = Callable[[bytes], None]


# --- mutations, written as bytes so that every fuzzer can make them up


def mutate(seed: bytes, program: bytes) -> bytes:
    """The seed after the steps of a program: a byte for the kind of each, two for the place, one to work with."""
    data = bytearray(seed)
    for kind, low, high, n in struct.iter_unpack("BBbB", program[: len(program) // 4 * 4]):
        at = high << 8 | low  # negative: from the end, where the footer is
        at = max(0, len(data) + at) if at < 0 else at % (len(data) + 1)
        match kind % 9:
            case 0:
                data[at : at + 1] = bytes(byte ^ 1 << n % 8 for byte in data[at : at + 1])
            case 1:
                data[at : at + 1] = bytes([n])
            case 2:
                number = [0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, len(data)][n % 8]
                data[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                del data[at : at + n]
            case 4:
                data[at:at] = data[:n]
            case 5:
                del data[at:]
            case 6:
                data[at : at + n] = bytes(n)
            case 7:
                data[at:at] = bytes([n])
            case _:
                _seal(data)
    return bytes(data)


def _seal(data: bytearray) -> None:
    """Give a value file the checksum that its footer should have: so that what lies behind this check is reached."""
    if len(data) >= _TRAILER.size:
        end = struct.unpack_from("<Q", data, len(data) - 40)[0]
        data[-16:] = struct.pack("<Q8s", xxh3_64_intdigest(bytes(data[end:-16])), b"CHESTv1\n")


# --- value files

CHECKED = 100  # instead of a megabyte
_TRAILER = struct.Struct("<QQQQQ8s")
_ENTRY = struct.Struct("<QQQBB6x")


def _file(*buffers: bytes | bytearray, note: bytes = b"") -> bytes:
    """A value file with these buffers, be they smaller than a pickler makes them."""
    file = io.BytesIO()
    sink = _pickled._Sink(file)
    sink.write(b"\x80\x05" + b"the pickle" * 3)
    for number, buffer in enumerate(buffers):
        sink.write(b"more %d" % number + _pickled._header(len(buffer), type(buffer) is bytes))
        sink.write(PickleBuffer(buffer))
    sink.write(b"its end.")
    sink.close(note)
    return file.getvalue()


FILES = [
    _file(note=b"\1\0k"),
    _file(b"a" * 70, bytearray(b"b" * 90), note=b"of the caller"),
    _file(bytearray(b"large " * 40), b"small", b""),
    b"\x80\x04N.",
]
_UNPICKLE = _pickled._unpickle
_through: list[tuple[list[bytes], list[bytes]]] = []  # what has come through to the unpickler


def _look(parts: list[Any], buffers: Any, unpickler: Any) -> None:
    _through.append(([bytes(part) for part in parts], [bytes(buffer) for buffer in buffers]))


@contextlib.contextmanager
def nothing_is_unpickled() -> Iterator[None]:
    with (
        mock.patch.object(_pickled, "_unpickle", _look),
        mock.patch.object(_valuefile, "CHECKED", CHECKED),
        mock.patch.object(_keys, "pickle", None),
    ):
        yield


def _load(data: bytes, *, verify: bool, digest: int | None) -> tuple[bytes, list[bytes]] | None:
    """What reached the unpickler, None if the file was refused."""
    _through.clear()
    try:
        _pickled.load(data, verify=verify, digest=digest)
    except (CorruptError, LoadError, MemoryError):
        assert not _through, "unpickled first, and refused after that"
        return None
    [(parts, buffers)] = _through
    return b"".join(parts), buffers


def _expected(number: int) -> tuple[int | None, tuple[bytes, list[bytes]]]:
    with nothing_is_unpickled():
        layout = _valuefile.read_footer(FILES[number])
        found = _load(FILES[number], verify=True, digest=None)
    assert found is not None
    return layout and layout.digest, found


_EXPECTED = [_expected(number) for number in range(len(FILES))]


def value_file(data: bytes) -> None:
    """The first byte says how: a whole file follows, or a program that changes one of ours."""
    if not data:
        return
    how, rest = data[0], data[1:]
    number = how % len(FILES)
    changed = mutate(FILES[number], rest) if how & 128 else rest
    digest, (stream, buffers) = _EXPECTED[number]
    for verify in (True, False):
        if digest is not None and (found := _load(changed, verify=verify, digest=digest)):
            assert found[0] == stream, "another pickle than was written"
            assert len(found[1]) == len(buffers)
            for one, other in zip(found[1], buffers, strict=True):
                assert len(one) == len(other), "a buffer of another size"
                assert one == other or (len(one) > CHECKED and not verify), "another buffer than was written"
        if found := _load(changed, verify=verify, digest=None):
            _check_sealed(changed, *found, verify)


def _check_sealed(data: bytes, stream: bytes, buffers: list[bytes], verify: bool) -> None:
    """A file that was accepted without knowing its checksum agrees with itself, worked out here once more."""
    if data[-8:] != b"CHESTv1\n" or len(data) < _TRAILER.size:
        assert data[:10] != b"\x80\x05C\x05chest0", "a file that has lost its footer"
        assert (stream, buffers) == (data, [])
        return
    checksum, end, n, _, digest, _ = _TRAILER.unpack(data[-_TRAILER.size :])
    assert xxh3_64_intdigest(data[end:-16]) == digest
    covered, start = b"", 0
    entries = list(_ENTRY.iter_unpack(data[end : end + n * _ENTRY.size]))
    for (offset, length, expected, _, _), buffer in zip(entries, buffers, strict=True):
        assert buffer == data[offset : offset + length]
        assert xxh3_64_intdigest(buffer) == expected or (length > CHECKED and not verify)
        covered += data[start:offset]
        start = offset + length
    assert xxh3_64_intdigest(covered + data[start:end]) == checksum


# --- records of the index


class Records:
    """An index with a few records, and what its tables hold of them."""

    def __init__(self, folder: str) -> None:
        self.index = LmdbIndex.open(folder, sync=False, map_size=8 << 20)
        puts = [Put(b"sword", 1, 0, b"a small value", b""), Put(b"h" + bytes(32), 2, 2, b"\1" * 30, b"a pickled key")]
        self.index.commit(puts, notes=lambda _: [b"a note", b"another note"], meta={b"setting": b"on", b"other": b""})
        env = self.index._env
        self.tables = [env.index, env.order, env.pending, env.meta]
        with env.begin() as txn:
            self.pairs = [[(bytes(k), bytes(v)) for k, v in txn.cursor(db)] for db in self.tables]
        self.expected = [self.read(table) for table in range(4)]

    def read(self, table: int) -> list[Any]:
        """All that a table says, each thing in every way, or the error."""
        index = self.index
        keys = [key for key, _ in self.pairs[table]]
        if table == 0:
            each: list[Any] = [_told(partial(index.get, key)) for key in keys]
            many = [_told(partial(self._get_beside, key)) for key in keys]
            assert each == many
            return each
        if table == 1:
            ways: list[Callable[[], Any]] = [
                lambda: index.page(0, 1)[0],
                lambda: index.page(1, 1)[0],
                lambda: (index.page(), index.page(reverse=True)),
            ]
            return [_told(way) for way in ways]
        if table == 2:
            return [_told(index.notes)]
        return [_told(partial(index.meta, key)) for key in keys]

    def _get_beside(self, key: bytes) -> Record | None:
        return self.index.get_many([b"none", key])[1][1]

    def put(self, table: int, pairs: list[tuple[bytes, bytes]]) -> None:
        with self.index._env.begin(write=True) as txn:
            for key, data in pairs:
                txn.put(key, data, db=self.tables[table])

    def __call__(self, data: bytes) -> None:
        """Two bytes say which record is replaced and by what; a whole one follows, or a program that changes one of ours."""
        if len(data) < 2:
            return
        table, (which, source) = data[0] % 4, (data[1] & 1, data[1] >> 1 & 1)
        pairs = self.pairs[table]
        key, old = pairs[which]
        new = data[2:] if data[1] & 4 else mutate(pairs[source][1], data[2:])
        if len(new) >= 8 and new != old and xxh3_64_digest(key + new[:-8]) == new[-8:]:
            return  # forged, and not damaged
        self.put(table, [(key, new)])
        try:
            found = self.read(table)
        finally:
            self.put(table, [(key, old)])
        same = [one == other for one, other in zip(found, self.expected[table], strict=True)]
        if new == old:
            assert all(same), "the error of the one before"
            return
        damaged = [which, 2] if table == 1 else [0] if table == 2 else [which]
        for number, told in enumerate(found):
            assert told is CorruptError if number in damaged else same[number], f"{number}: {told}"


def _told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except CorruptError:
        return CorruptError


# --- references and notes


REFERENCES = [
    Ref(70_000, 1 << 63, "1-2-3-a", "_pair/word").pack(),
    Ref(0, 0, "", "\udcff").pack(),
    Ref(70_000, 5, "1-2-3-a", "word", 90_000, bytes(32)).pack(),
    pack_note(b"sword", "1-2-3-a", "word"),
    pack_note(b"h" + bytes(32), "", "_pair/word"),
]


def reference(data: bytes) -> None:
    """What can be taken apart is what comes of putting it together, byte for byte."""
    with contextlib.suppress(CorruptError):
        assert Ref.unpack(data).pack() == data, "a reference of other bytes"
    with contextlib.suppress(CorruptError):
        assert pack_note(*unpack_note(data)) == data, "a note of other bytes"


# --- names


KEYS: list[Any] = [
    *("word", "\udcff", b"bytes", 1, -(1 << 70), 0.5, 1 + 2j, None, ..., range(3, 9, 2)),
    *((1, "a"), (1.5, ("b", None)), frozenset({1, "x", (2, b"y")}), ("a\0b", -5), ()),
]
NAMES = [name for name in map(_keys.name_of, KEYS) if name is not None]


def name(data: bytes) -> None:
    """A name is that of the key that it is decoded to, and of no other."""
    data = data[:511]
    if not data:
        return
    with contextlib.suppress(CorruptError, LoadError, MemoryError):
        key = _keys.decode(data, b"")
        assert _keys.name_of(key) == data, f"this is the name of another key, {key!r}"


# --- what the safe serializer writes


def _safe_values() -> list[Any]:
    """One of each kind; those of packages where they are installed."""
    values: list[Any] = [
        *(
            None,
            {"a": [1, 2.5, True, "text", b"bytes"]},
            (1, ("x",)),
            [(1, "a"), (2, "b")],
            {1, 2},
            frozenset({(1,)}),
            {(1,): 2},
        ),
        *(
            2**70,
            "\ud800",
            1j,
            bytearray(b"x"),
            Decimal("1.5"),
            Fraction(1, 3),
            UUID(int=1),
            range(3),
            slice(1),
            ...,
            Path("x"),
        ),
        *(datetime(2020, 1, 1, tzinfo=timezone.utc), date(2020, 1, 1), time(1, 2), timedelta(1)),
    ]
    with contextlib.suppress(ImportError):
        numpy: Any = importlib.import_module("numpy")
        values += [numpy.arange(6.0).reshape(2, 3), numpy.ones(2, [("a", "i4"), ("b", "M8[s]")]), numpy.float32(1)]
        pandas: Any = importlib.import_module("pandas")
        dates = pandas.date_range("2020", periods=2)
        frame = {
            "a": [1.0, 2.0],
            "s": ["x", None],
            "c": pandas.Categorical(["a", "b"]),
            "i": pandas.array([1, None], dtype="Int64"),
        }
        values += [pandas.DataFrame(frame, index=dates), pandas.MultiIndex.from_tuples([(1, "a"), (2, "b")]), pandas.NaT]
        arrow: Any = importlib.import_module("pyarrow")
        values += [arrow.table({"a": [1, 2], "s": ["x", None], "l": [[1], []]}), arrow.array(["a", "b"]).dictionary_encode()]
    return values


def _safe_seeds() -> list[bytes]:
    if importlib.util.find_spec("msgspec") is None:
        return []
    _safe: Any = importlib.import_module("chest.serializers._safe")
    seeds = []
    for value in _safe_values():
        file = io.BytesIO()
        _safe.dump(value, file, b"note")
        seeds += [_safe.dumps(value), file.getvalue()]
    return seeds


SAFE_SEEDS = _safe_seeds()


def safe(data: bytes) -> None:
    """What is read at all can be written again, and then is the same; what cannot is nested too deep, or of too many parts."""
    _safe: Any = importlib.import_module("chest.serializers._safe")
    for read in (_safe.loads, lambda data: _safe.load_file(data, verify=True)[0]):
        try:
            value = read(data)
        except (CorruptError, LoadError, MemoryError):
            continue
        with contextlib.suppress(TypeError):
            again = _safe.dumps(value)
            assert _safe.dumps(_safe.loads(again)) == again, "a value that is not what was written"


# --- pickles that an allow-list bounds


class Innocent:
    """What the list allows."""


_ALLOWED = AllowedPickles([__name__])
PICKLES = [
    *(pickle.dumps([Innocent(), *_safe_values()[:-6]], protocol) for protocol in (0, 2, 5)),
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x04uuid\x8c\x04UUID\x93\x8c\x08__init__\x86R.",
    b"\x80\x04\x82\x01.",
]
_BOMB = re.compile(rb"r.{2}[^\0]|r..[^\0]|p\d{6}|I\d{7}|L\d{7}", re.DOTALL)
"""Places in the memo, and numbers, that take all memory there is: an allow-list is no bound for that."""


def allowed(data: bytes) -> None:
    """Nothing is found but what is allowed, and whatever comes of it is a documented error."""
    if _BOMB.search(data):
        return
    found: list[tuple[str, str]] = []

    def note(module: str, qualname: str) -> Any:
        found.append((module, qualname))
        return _found(module, qualname)

    _found = AllowedPickles._found
    with (
        mock.patch.object(AllowedPickles, "_found", staticmethod(note)),
        mock.patch.object(_pickled, "_unpickle", _UNPICKLE),
        contextlib.suppress(CorruptError, LoadError, MemoryError),
    ):
        _ALLOWED.load_file(data)
    for module, qualname in found:
        assert (module, qualname) in _ALLOWED._known or module == __name__, f"{module}.{qualname} was found"


# --- envelopes


PLAIN = bytes(range(256)) * 40 + b"a text, " * 3000
_KEY = b"a key for fuzzing, of 32 bytes.."
SEALS = [Seal(_KEY, bytes(32), ""), *([Seal(_KEY, bytes(32), "aes-gcm")] if importlib.util.find_spec("cryptography") else [])]


def _enveloped(seal: Seal | None, compression: Compression | None) -> tuple[int, bytes, int, bytes]:
    """The kind of a record, the file, its plain size and what the record says of its seal."""
    file = io.BytesIO()
    wrapping = Envelope(compression, seal).wrapping(b"sword", lambda f: f.write(PLAIN), stops=False)
    wrapping(file)
    return 2 | wrapping.method << 2, file.getvalue(), wrapping.plain, wrapping.seal


_GZIP = Compression(METHODS["gzip"], 1)
SEALED = [(seal, *_enveloped(seal, compression)) for seal in SEALS for compression in (None, _GZIP)]
COMPRESSED = _enveloped(None, _GZIP)[1]
BODY = Envelope(_GZIP, None).wrap(0, PLAIN)
MESSAGES = [(seal, seal.close(RECORD, 1, b"sword", b"a message")) for seal in SEALS]


def envelope(data: bytes) -> None:
    """A sealed file or message that was changed is refused; compressed ones hold no more than was said."""
    if not data:
        return
    number, program = data[0], data[1:]
    seal, kind, stored, plain, said = SEALED[number % len(SEALED)]
    changed = mutate(stored, program) if number & 128 else program
    with contextlib.suppress(CorruptError):
        name = b"sword" if seal is None else seal.name(b"sword")
        found = open_file(seal, kind, name, memoryview(changed), plain, said)
        assert changed == stored, "another file than was sealed"
        assert found == PLAIN
    with contextlib.suppress(TamperedError):
        list(seal.read(memoryview(stored), b"sword", mutate(said, program), private_memory))
        assert mutate(said, program) == said, "another seal than was given"
    seal, message = MESSAGES[number % len(MESSAGES)]
    changed = mutate(message, program) if number & 128 else program
    with contextlib.suppress(TamperedError):
        assert seal.open(RECORD, 1, b"sword", changed) == b"a message"
        assert changed == message, "another message than was closed"
    changed = mutate(COMPRESSED, program) if number & 128 else program
    for size in (len(PLAIN), len(program) % 1000):
        with contextlib.suppress(CorruptError):
            assert len(open_file(None, 2 | 3 << 2, b"sword", memoryview(changed), size, b"")) == size
    with contextlib.suppress(CorruptError):
        changed = mutate(BODY[1], program) if number & 128 else program
        assert len(open_body(BODY[0], changed)) == int.from_bytes(changed[:4], "little") < 1 << 16


# --- all of them


INPUTS: dict[str, list[bytes]] = {
    # Each file in the place of each, and two programs.
    "value_file": [
        *(bytes([number]) + data for number in range(len(FILES)) for data in FILES),
        *(b"\x81\0\0\0\1", b"\x82\0\xf0\xff\1"),
    ],
    "record": [bytes([table, way]) + bytes([1, 3, 0, 9]) for table in range(4) for way in range(4)],
    "reference": REFERENCES,
    "name": NAMES,
    "safe": SAFE_SEEDS,
    "allowed": PICKLES,
    "envelope": [bytes([number]) + stored for number, (_, _, stored, _, _) in enumerate(SEALED)] + [b"\x80", b"\x81\0\0\0\1"],
}


@contextlib.contextmanager
def aimed_at(name_of_target: str) -> Iterator[Target]:
    """A target, ready."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_is_unpickled())
        if name_of_target != "record":
            targets = {
                "value_file": value_file,
                "reference": reference,
                "name": name,
                "safe": safe,
                "allowed": allowed,
                "envelope": envelope,
            }
            yield targets[name_of_target]
            return
        records = Records(stack.enter_context(tempfile.TemporaryDirectory(prefix="chest-fuzz-")))
        stack.callback(records.index.close)
        yield records


def write_inputs(target: str, folder: Path) -> None:
    """What a run begins with."""
    folder.mkdir()
    for number, data in enumerate(INPUTS[target]):
        (folder / str(number)).write_bytes(data)


if __name__ == "__main__":
    with aimed_at(sys.argv[1]) as aimed:
        atheris.Setup([sys.argv[0], *sys.argv[2:]], aimed)
        atheris.Fuzz()
