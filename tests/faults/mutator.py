"""A process that damages copies of a chest, one after the other, and says what became of each.

    python mutator.py TEMPLATE WORK OUTSIDE TARGET FIRST LAST

A damaged index may end the process with a signal, so this runs in one of its own: before each mutation it prints a line
``start n what``, after it a line ``end n outcome ...``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import oracle

from chest import Chest, check
from chest.errors import ChestError

REPAIRED = 1 if os.environ.get("CHEST_TORTURE", "") not in ("", "0") else 5  # each n-th mutation is repaired, too

KEYS: list[Any] = [oracle.key(0, n) for n in range(oracle.N_KEYS)] + ["large", "nested", 0.5, None]


def value(key: Any) -> Any:
    """The value of a key of the template."""
    if key == "large":
        return np.random.default_rng(1).integers(0, 1 << 40, 200_000)  # 1.6 MB: checked under verify="always" only
    if key == "nested":
        return {"a": [np.arange(10_000), {"b": b"x" * 70_000}], "c": ("y" * 70_000,)}
    if key in (0.5, None):
        return [key, {"z": 1}]
    return oracle.value(oracle.Tag(0, KEYS.index(key), 1, 1))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and type(a) is type(b):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return oracle.same(a, b)


def make_template(path: Path) -> None:
    """A chest with values of every kind, each at its second version, and some keys deleted."""
    with Chest[Any, Any](path=path) as chest:
        for key in [*KEYS, "deleted"]:
            chest[key] = ["the first version", np.arange(9_000)]
        chest.flush()
        del chest["deleted"]
        for key in KEYS:
            chest[key] = value(key)
        chest.flush()


# --- mutations: each takes a file (or folder) and says what it did


def truncate(file: Path, rng: random.Random) -> str:
    size = rng.choice([0, 1, rng.randrange(file.stat().st_size), file.stat().st_size - 1])
    os.truncate(file, size)
    return f"truncated to {size}"


def extend(file: Path, rng: random.Random) -> str:
    with file.open("ab") as f:
        f.write(rng.randbytes(rng.choice([1, 4096])))
    return "extended"


def _overwrite(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        f.write(data)


def flip(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    # Heads and tails hold what the reader goes by; the middle is payload.
    at = rng.choice([rng.randrange(len(data)), rng.randrange(min(200, len(data))), -rng.randint(1, min(300, len(data)))])
    at %= len(data)
    bit = 1 << rng.randrange(8)
    _overwrite(file, at, bytes([data[at] ^ bit]))
    return f"bit {bit} of byte {at} of {len(data)} flipped"


def zero(file: Path, rng: random.Random) -> str:
    size = file.stat().st_size
    length = rng.choice([size, 4096, rng.randint(1, size), 8])
    at = rng.randrange(0, max(1, size - length + 1))
    data = file.read_bytes()[at : at + length]
    if not any(data):
        at, data = 0, b"\1" * min(16, size)
    _overwrite(file, at, bytes(len(data)))
    return f"{len(data)} bytes at {at} zeroed"


def scramble(file: Path, rng: random.Random) -> str:
    size = file.stat().st_size
    length = min(size, rng.choice([8, 64, 4096]))
    at = rng.randrange(0, size - length + 1)
    _overwrite(file, at, rng.randbytes(length))
    return f"{length} random bytes at {at}"


def swap_pages(file: Path, rng: random.Random) -> str:
    n_pages = file.stat().st_size // 4096
    a, b = rng.randrange(n_pages), rng.randrange(n_pages)
    data = file.read_bytes()
    _overwrite(file, a * 4096, data[b * 4096 : (b + 1) * 4096])
    _overwrite(file, b * 4096, data[a * 4096 : (a + 1) * 4096])
    return f"pages {a} and {b} swapped"


def remove(file: Path, _: random.Random) -> str:
    _clear(file)
    return "removed"


def _clear(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()


def to_fifo(file: Path, _: random.Random) -> str:
    _clear(file)
    os.mkfifo(file)
    return "replaced by a FIFO"


def to_socket(file: Path, _: random.Random) -> str:
    _clear(file)
    os.mknod(file, 0o600 | stat.S_IFSOCK)
    return "replaced by a socket"


def to_folder(file: Path, _: random.Random) -> str:
    _clear(file)
    file.mkdir()
    (file / "inner").write_bytes(b"x")
    return "replaced by a folder"


def to_empty_file(file: Path, _: random.Random) -> str:
    _clear(file)
    file.write_bytes(b"")
    return "replaced by an empty file"


def to_device(file: Path, _: random.Random) -> str:
    _clear(file)
    file.symlink_to("/dev/zero")
    return "replaced by a link to /dev/zero"


def make_outside(outside: Path) -> None:
    """Files of somebody else's, for links to lead to: a value file and a pickle too."""
    shutil.rmtree(outside, ignore_errors=True)
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "inner").write_bytes(b"inner")
    (outside / "pickle").write_bytes(b"\x80\x04K\x01.")
    with Chest[str, Any](path=outside.parent / "other") as chest:
        chest["x"] = np.arange(20_000)
        chest.flush()
        (outside / "value").write_bytes(Path(chest.key_to_filename("x")).read_bytes())
        chest.drop()


def look_at(outside: Path) -> dict[str, tuple[Any, ...]]:
    """All that must not change of other people's files."""
    found = {}
    for folder, _, names in os.walk(outside):
        for name in [".", *names]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = Path(path).read_bytes() if os.path.isfile(path) else b""
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink, content)
    return found


class Bench:
    """One copy of the template, to be damaged, and a folder outside of it that nothing may touch."""

    def __init__(self, template: Path, work: Path, outside: Path) -> None:
        self.template, self.work, self.outside = template, work, outside

    def fresh(self) -> None:
        if self.work.exists() or self.work.is_symlink():
            shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work, symlinks=True)

    def to_link_outside(self, file: Path, rng: random.Random) -> str:
        target = self.outside / rng.choice(["pickle", "value", "folder", "missing"])
        _clear(file)
        file.symlink_to(target)
        return f"replaced by a link to {target.name}"

    def to_looping_link(self, file: Path, _: random.Random) -> str:
        _clear(file)
        file.symlink_to(file.name)
        return "replaced by a link to itself"

    def swap_values(self, file: Path, rng: random.Random) -> str:
        other = rng.choice([f for f in self.value_files() if f != file])
        spare = self.work / "spare"
        file.rename(spare)
        other.rename(file)
        spare.rename(other)
        return f"swapped with {other.name:.20}"

    def to_hard_link_of_other(self, file: Path, rng: random.Random) -> str:
        other = rng.choice([f for f in self.value_files() if f != file])
        file.unlink()
        os.link(other, file)
        return f"replaced by {other.name:.20}"

    def to_old_version(self, file: Path, _: random.Random) -> str:
        with Chest[str, Any](path=self.work.parent / "other") as chest:
            chest["x"] = np.arange(9_001)
            chest.flush()
            data = Path(chest.key_to_filename("x")).read_bytes()
            chest.drop()
        file.write_bytes(data)
        return "replaced by a whole value file of another chest"

    def value_files(self) -> list[Path]:
        """The files of large values."""
        names = sorted(oracle.files(self.work))
        return [self.work / name for name in names if (self.work / name).stat().st_size > 65_000]

    def damage_value(self, rng: random.Random) -> str:
        file = rng.choice(self.value_files())
        kinds: list[Callable[[Path, random.Random], str]] = [
            *[truncate, flip, flip, flip, zero, scramble] * 2,
            *(extend, remove, to_fifo, to_socket, to_folder, to_device, to_empty_file),
            *(
                self.to_link_outside,
                self.to_looping_link,
                self.swap_values,
                self.to_hard_link_of_other,
                self.to_old_version,
            ),
        ]
        return f"value file {file.name:.20}: {rng.choice(kinds)(file, rng)}"

    def damage_folder(self, rng: random.Random) -> str:
        """What lies around the index, and the index file as a whole."""
        kinds: list[Callable[[Path, random.Random], str]]
        kinds = [remove, to_fifo, to_socket, to_folder, to_empty_file, self.to_link_outside, self.to_looping_link]
        name = rng.choice(["data.mdb", "data.mdb", "lock.mdb", "generation", "new", ""])
        name = f".keys/{name}".rstrip("/")
        file = self.work / name
        if name == ".keys":
            kinds = [k for k in kinds if k not in (remove, to_folder)]  # without any index, the folder is a new chest
        elif name == ".keys/data.mdb":
            kinds += [truncate] * 5
        elif name in (".keys/generation", ".keys/lock.mdb"):
            kinds += [truncate, flip, zero, extend, scramble]
        if not file.exists():
            file.write_bytes(b"")
            kinds = [k for k in kinds if k not in (truncate, flip, zero, scramble)]
        return f"{name}: {rng.choice(kinds)(file, rng)}"

    def damage_record(self, rng: random.Random) -> str:
        """Change what LMDB holds, by way of LMDB: its pages are whole and a record is not."""
        env = lmdb.open(str(self.work / ".keys"), max_dbs=10, lib_version=0)
        try:
            with env.begin(write=True) as txn:
                names = [bytes(name) for name, _ in txn.cursor()]
                name = rng.choice(names)
                db = env.open_db(name, txn, create=False)
                pairs = [(bytes(k), bytes(v)) for k, v in txn.cursor(db)]
                if not pairs:
                    return "nothing: an empty table"
                k, v = rng.choice(pairs)
                kind = rng.randrange(4)
                if kind == 0 and v:
                    at = rng.randrange(len(v))
                    txn.put(k, v[:at] + bytes([v[at] ^ 1 << rng.randrange(8)]) + v[at + 1 :], db=db)
                    what = f"a bit of byte {at} of {len(v)} flipped"
                elif kind == 1:
                    length = rng.randrange(len(v) + 1)
                    txn.put(k, v[:length], db=db)
                    what = f"cut to {length} of {len(v)}" if length < len(v) else "nothing"
                elif kind == 2:
                    txn.put(k, rng.randbytes(len(v)), db=db)
                    what = "random bytes"
                else:
                    other = rng.choice(pairs)
                    txn.put(k, other[1], db=db)
                    txn.put(other[0], v, db=db)
                    what = "swapped with another"
        finally:
            env.close()
        return f"record {k!r:.20} of {name.decode()}: {what}"

    def damage_inside(self, rng: random.Random) -> str:
        """Damage LMDB's own pages; only LMDB's own checks are between this and the reader."""
        file = self.work / ".keys" / "data.mdb"
        kinds: list[Callable[[Path, random.Random], str]] = [flip, zero, scramble, swap_pages]
        return f"data.mdb: {rng.choice(kinds)(file, rng)}"

    # --- what became of it

    def outcomes(self) -> Counter[str]:
        """Read everything in every way, then write: what each step gave."""
        found: Counter[str] = Counter()
        always = {"verify": "always"}

        def attempt(step: str, action: Callable[[], bool]) -> None:
            try:
                found["right" if action() else f"WRONG in {step}"] += 1
            except ChestError as error:
                found[type(error).__name__] += 1
                if not str(error):
                    found[f"NO MESSAGE in {step}"] += 1
            except Exception as error:
                found[f"UNTYPED {type(error).__name__} in {step}: {error!s:.200}"] += 1

        try:
            chest: Chest[Any, Any] = Chest(path=self.work, available_memory=300_000, **always)  # type: ignore[arg-type]
        except ChestError as error:
            found[type(error).__name__ + " at open"] += 1
            return found
        except Exception as error:
            found[f"UNTYPED {type(error).__name__} at open: {error!s:.200}"] += 1
            return found
        try:
            for key in KEYS:
                attempt("get", lambda key=key: same(chest[key], value(key)))
            attempt("len", lambda: len(chest) == len(KEYS))
            attempt("iter", lambda: list(chest) == KEYS)
            attempt("in", lambda: all(key in chest for key in KEYS) and "deleted" not in chest)
            attempt("items", lambda: all(same(found, value(key)) for key, found in chest.items()))
            attempt("default", lambda: all(same(chest.get(key, "default"), value(key)) for key in KEYS))

            def write() -> bool:
                for key in KEYS:
                    chest[key] = [key, np.arange(9_000)]
                chest.flush()
                return all(same(chest[key], [key, np.arange(9_000)]) for key in KEYS)

            attempt("write", write)

            def delete() -> bool:
                last = chest.pop("large")  # the old one where the write has failed
                chest.flush()
                return same(last, value("large")) or same(last, ["large", np.arange(9_000)])

            attempt("delete", delete)
        finally:
            try:
                chest.close()
            except ChestError as error:
                found[type(error).__name__ + " at close"] += 1
                chest._end()
            except Exception as error:
                found[f"UNTYPED {type(error).__name__} at close: {error!s:.200}"] += 1
                chest._end()
        return found

    def repaired(self, target: str) -> Counter[str]:
        """Check and repair: what is there afterwards must be right, and checking it again find nothing."""
        found: Counter[str] = Counter()
        try:
            problems = list(check(self.work))
            found["problems"] += len(problems)
            list(check(self.work, repair=True))
            left = list(check(self.work))
            if left:
                found[f"UNREPAIRED {[(p.kind, p.message) for p in left[:3]]!s:.300}"] += 1
            with Chest[Any, Any](path=self.work, verify="always") as chest:
                for key in chest:
                    # Of an index whose pages are damaged an older one may be all that is left.
                    older = target == "inside" and same(chest[key], ["the first version", np.arange(9_000)])
                    # And what a file says is the value of a key that is not there becomes that.
                    other = key == "x" and same(chest[key], np.arange(9_001))
                    if not (older or other) and (key not in KEYS or not same(chest[key], value(key))):
                        found[f"WRONG after repair: {key!r:.60}"] += 1
                chest["works"] = np.arange(9_000)
        except ChestError as error:
            found[f"UNREPAIRED {type(error).__name__}: {error!s:.200}"] += 1
        except Exception as error:
            found[f"UNTYPED {type(error).__name__} in repair: {error!s:.200}"] += 1
        return found


def main(template: str, work: str, outside: str, target: str, first: str, last: str) -> None:
    bench = Bench(Path(template), Path(work), Path(outside))
    before = look_at(bench.outside)
    for number in range(int(first), int(last)):
        rng = random.Random(f"{target}/{number}")
        bench.fresh()
        print("start", number, getattr(bench, f"damage_{target}")(rng), flush=True)
        outcomes = bench.outcomes()
        if number % REPAIRED == 0:
            bench.fresh()
            getattr(bench, f"damage_{target}")(random.Random(f"{target}/{number}"))
            outcomes += bench.repaired(target)
        if look_at(bench.outside) != before:
            outcomes["TOUCHED what lies outside"] += 1
            make_outside(bench.outside)
            before = look_at(bench.outside)
        print("end", number, json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
