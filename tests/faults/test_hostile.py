"""A hostile or damaged folder: a typed error or the right value. Never a wrong one, never a default, never a hang.

What is damaged: value files, what lies around the index, records inside the index (by way of LMDB, so that its pages
stay whole), and the pages themselves. Only for the last can nothing be promised: LMDB does not check its pages, and a
damaged one can end the process or hide a key. Those outcomes are counted and printed; even there no *wrong value* may
come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mutator
import numpy as np
import oracle
import pytest
from counts import count

from chest import Chest
from chest.errors import ChestError

pytestmark = pytest.mark.torture

BATCH = 50  # mutations of one process
HANGS_AFTER_S = 120.0  # a whole batch takes some 10 s


class Outcome(NamedTuple):
    """What became of one mutation. ``signal`` is 0 where the process lived on."""

    what: str
    counts: dict[str, int]
    signal: int

    def matching(self, *words: str) -> list[str]:
        return [name for name in self.counts if any(word in name for word in words)]


class Arena(NamedTuple):
    """A template, room for copies of it, and a folder outside of it that nothing may touch."""

    root: Path

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def run(self, target: str, first: int, last: int) -> Iterator[Outcome]:
        """Mutations ``first`` to ``last``; a process that dies of one is followed by another."""
        while first < last:
            arguments = [self.root / "template", self.root / "work", self.outside, target, first, min(last, first + BATCH)]
            process = subprocess.Popen(
                [sys.executable, str(Path(mutator.__file__)), *map(str, arguments)],
                env=oracle.environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                out, err = process.communicate(timeout=HANGS_AFTER_S)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                raise AssertionError(f"{target}: hangs after {out.splitlines()[-1:]}") from None
            what, counts = "", None
            for line in out.splitlines():
                word, number, rest = line.split(" ", 2)
                first = int(number) + 1
                if word == "start":
                    what, counts = f"{target} {number}: {rest}", None
                else:
                    counts = json.loads(rest)
                    yield Outcome(what, counts, 0)
            if process.returncode > 0:
                raise AssertionError(f"{what}: {err[-2000:]}")
            if process.returncode < 0:
                assert counts is None, f"killed by signal {-process.returncode} after {what}: {err[-500:]}"
                yield Outcome(what, {}, -process.returncode)


@pytest.fixture(name="arena")
def _arena(tmp_path: Path) -> Iterator[Arena]:
    # In memory where there is such a place: syncing hundreds of copies to a disk takes most of the time otherwise.
    in_memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=in_memory)) if os.access(in_memory, os.W_OK) else tmp_path
    arena = Arena(place)
    mutator.make_template(place / "template")
    mutator.make_outside(arena.outside)
    try:
        yield arena
    finally:
        shutil.rmtree(place)


def _report(target: str, outcomes: list[Outcome]) -> Counter[str]:
    """Mutations by the worst that became of them."""
    ranks = (
        "TOUCHED",
        "WRONG in get",
        "WRONG in items",
        "WRONG in write",
        "WRONG",
        "UNTYPED KeyError",
        "UNTYPED",
        "Error",
        "right",
    )
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.signal:
            counts[f"signal {outcome.signal}"] += 1
        else:
            counts[next((rank for rank in ranks if outcome.matching(rank)), "nothing")] += 1
    print(f"{len(outcomes)} mutations of {target}:", dict(counts))
    return counts


@pytest.mark.parametrize(("target", "ci", "full"), [("value", 130, 900), ("record", 60, 400), ("folder", 60, 400)])
def test_damage_gives_a_typed_error_or_the_right_value(
    arena: Arena, target: str, ci: int, full: int, scale: Callable[[int, int], int]
) -> None:
    outcomes = list(arena.run(target, 0, scale(ci, full)))
    _report(target, outcomes)
    assert len(outcomes) == scale(ci, full)
    died = [outcome for outcome in outcomes if outcome.signal]
    assert not died, died[:5]
    bad = [(outcome.what, outcome.matching("WRONG", "UNTYPED", "NO MESSAGE", "TOUCHED", "UNREPAIRED")) for outcome in outcomes]
    bad = [(what, how) for what, how in bad if how]
    assert not bad, "\n".join(f"{what} -> {how!s:.300}" for what, how in bad[:20]) + f"\n{len(bad)} in all"
    seen = Counter(name for outcome in outcomes for name in outcome.counts)
    assert seen["right"] > len(outcomes) // 3  # damage to one value leaves the others alone
    assert any("Corrupt" in name for name in seen)
    count("damaged files and records: a typed error or the right value", len(outcomes), len(outcomes))


def test_damage_to_the_pages_of_the_index_never_gives_a_wrong_value(arena: Arena, scale: Callable[[int, int], int]) -> None:
    n = scale(50, 300)
    outcomes = list(arena.run("inside", 0, n))
    counts = _report("inside", outcomes)
    assert len(outcomes) == n
    wrong = [o.what for o in outcomes if o.matching("WRONG in get", "WRONG in items", "WRONG in delete")]
    assert not wrong, (wrong[:9], counts)
    assert not [o.what for o in outcomes if o.matching("TOUCHED")]
    mended = [(o.what, o.matching("UNREPAIRED", "after repair")) for o in outcomes if o.matching("UNREPAIRED", "after repair")]
    assert not mended, "\n".join(map(str, mended[:9]))
    untyped = [(o.what, o.matching("UNTYPED")) for o in outcomes if o.matching("UNTYPED")]
    untyped = [(what, names) for what, names in untyped if any("KeyError" not in name for name in names)]
    assert not untyped, "\n".join(f"{what} -> {names}" for what, names in untyped[:9]) + f"\n{counts}"
    count("damage inside of LMDB's pages: no wrong value", n, n)


def test_the_mutator_sees_a_wrong_value(arena: Arena) -> None:
    bench = mutator.Bench(arena.root / "template", arena.root / "work", arena.outside)
    bench.fresh()
    assert set(bench.outcomes()) == {"right"}
    bench.fresh()
    with Chest[Any, Any](path=bench.work) as chest:
        chest["large"][-1] += 1
    assert {"right", "WRONG in get", "WRONG in default", "WRONG in items"} == set(bench.outcomes())
    bench.fresh()
    with Chest[Any, Any](path=bench.work) as chest:
        del chest["nested"]
    assert any(name.startswith("UNTYPED KeyError in get") for name in bench.outcomes())


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 8191, 8192, 12288, 20000])
def test_a_truncated_index_is_refused_before_it_is_mapped(tmp_path: Path, size: int) -> None:
    path = tmp_path / "chest"
    mutator.make_template(path)
    os.truncate(path / ".keys" / "data.mdb", size)
    done = subprocess.run(  # in a process of its own: reading beyond the end of a mapped file is SIGBUS
        [
            sys.executable,
            "-c",
            "import sys\nfrom chest import Chest\nfrom chest.errors import ChestError\n"
            "try:\n    c = Chest(path=sys.argv[1])\n    print(list(c), [c[k] for k in c])\n"
            "except ChestError as error:\n    print(type(error).__name__, error)\n",
            str(path),
        ],
        env=oracle.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.startswith("CorruptError"), done.stdout


# --- hostile keys

HOSTILE_KEYS: list[Any] = [
    "../../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "/",
    "a/../../b",
    ".keys",
    ".keys/data.mdb",
    ("..", ".."),
    ("..", "..", "x"),
    (".keys", "data.mdb"),
    ("/", "tmp"),
    "nul\0inside",
    ("nul\0", "\0"),
    "\0",
    "k" * (1 << 20),
    ("k" * (1 << 20), "k"),
    b"k" * (1 << 20),
    "\ud800",
    ("\udfff", "\ud800x"),
    "x" + "\udc80" * 600,
    "con",
    "CON",
    "aux",
    "a b",
    "a\nb",
    "a:b",
    "~",
    "-rf",
    "_a",
    ("a", "b"),
    "0" + "0" * 32,
    "x~0123456789abcdef",
    10**400,
    -(10**400),
    1e308,
    float("inf"),
    tuple(range(500)),
    (((((((((("deep",),),),),),),),),),),
    frozenset({"../x", ("..", "y")}),
    "é",
    "e\u0301",
    "\U0001f5c4",
    "\u202egnp",
]


@pytest.mark.parametrize("large", [False, True], ids=["small values", "large values"])
def test_hostile_keys_are_keys_like_any_other_and_stay_inside_the_folder(tmp_path: Path, large: bool) -> None:
    inside = tmp_path / "a" / "b" / "chest"
    inside.parent.mkdir(parents=True)

    def make(n: int) -> Any:
        return np.arange(9_000) + n if large else [n]

    with Chest[Any, Any](path=inside) as chest:
        for n, key in enumerate(HOSTILE_KEYS):
            chest[key] = make(n)
        chest.flush()
        for n, key in enumerate(HOSTILE_KEYS):
            assert oracle.same(chest[key], make(n))
    with Chest[Any, Any](path=inside) as chest:
        assert list(chest) == HOSTILE_KEYS
        names = set()
        for n, key in enumerate(HOSTILE_KEYS):
            assert key in chest
            assert oracle.same(chest[key], make(n))
            name = Path(chest.key_to_filename(key))
            assert name.is_file()
            assert name.resolve().is_relative_to(inside.resolve())
            assert ".keys" not in name.relative_to(inside).parts[:1] or large
            names.add(name)
        assert len(names) == len(HOSTILE_KEYS)
        for key in HOSTILE_KEYS[::2]:
            del chest[key]
        chest.flush()
        assert list(chest) == HOSTILE_KEYS[1::2]
        oracle.check_tidy(chest)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["chest"]


@pytest.mark.parametrize("name", ["../outside", "/{root}/outside", "a/../../outside", ".keys/data.mdb", "..", "x\0y", ""])
def test_a_key_to_filename_that_leaves_the_folder_is_refused_and_touches_nothing(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    name = name.replace("/{root}", str(tmp_path))
    chest = Chest[str, Any](path=tmp_path / "chest", key_to_filename=lambda key: name if key == "evil" else key)
    chest["good"] = 1
    with pytest.raises((ChestError, ValueError)):  # noqa: PT012 - either may refuse it
        chest["evil"] = 2
        chest.flush()
    assert outside.read_bytes() == b"mine"
    chest.pop("evil", None)
    chest.close()
    with Chest[str, Any](path=tmp_path / "chest", key_to_filename=lambda key: key) as again:
        assert again == {"good": 1}
    assert outside.read_bytes() == b"mine"


def test_a_link_in_the_place_of_a_folder_of_values_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_bytes(b"mine")
    (outside / "c").write_bytes(b"mine too")
    path = tmp_path / "chest"
    with Chest[Any, Any](path=path) as chest:
        chest["first"] = 1
    (path / "_a").symlink_to(outside)
    with Chest[Any, Any](path=path) as chest:
        for name in "bcd":
            chest["a", name] = np.arange(20_000)
        try:
            chest.flush()
        except ChestError:
            for name in "bcd":
                del chest["a", name]
        else:
            assert all(oracle.same(chest["a", name], np.arange(20_000)) for name in "bcd")
            del chest["a", "b"]
            chest.flush()
    assert sorted(p.name for p in outside.iterdir()) == ["b", "c"]
    assert (outside / "b").read_bytes() == b"mine"
    assert (outside / "c").read_bytes() == b"mine too"


@pytest.mark.parametrize("name", [".keys", ".keys/new", "_a"])
def test_a_link_in_the_place_of_a_folder_of_the_chest_leads_nothing_astray(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in ("inner", "b", "1-2-3-0123456789abcdef"):  # the last one is like a value file of a dead process
        (outside / file).write_bytes(b"mine")
    path = tmp_path / "chest"
    with Chest[Any, Any](path=path) as chest:
        chest["a", "b"] = np.arange(20_000)
    shutil.rmtree(path / name, ignore_errors=True)
    (path / name).symlink_to(outside)
    before = mutator.look_at(outside)
    try:
        chest = Chest(path=path)
    except ChestError:
        pass
    else:
        with contextlib.suppress(ChestError):
            chest["a", "b"] = np.arange(30_000)
            chest.flush()
        with contextlib.suppress(ChestError):
            chest.clear()
        with contextlib.suppress(ChestError):
            chest.drop()
        if not chest._closed:
            chest._end()
    assert mutator.look_at(outside) == before


@pytest.mark.parametrize("link", ["link", "folder"])
def test_files_of_others_in_the_folder_are_never_overwritten_or_removed(tmp_path: Path, link: str) -> None:
    """Where a value's file name is taken by something that is not the chest's, that stays as it is."""
    path = tmp_path / "chest"
    path.mkdir()
    (tmp_path / "target").write_bytes(b"mine")
    for name in ("small", "large"):
        if link == "link":
            (path / name).symlink_to(tmp_path / "target")
        else:
            (path / name).mkdir()
            (path / name / "file").write_bytes(b"mine")
    with Chest[str, Any](path=path) as chest:
        chest["small"], chest["large"] = [1], np.arange(20_000)
        chest.flush()
        assert chest["small"] == [1]
        chest["small"], chest["large"] = [2], np.arange(30_000)
        chest.flush()
    with Chest[str, Any](path=path) as chest:
        assert oracle.same(chest["large"], np.arange(30_000))
        chest.clear()
    for name in ("small", "large"):
        if link == "link":
            assert os.readlink(path / name) == str(tmp_path / "target")
        else:
            assert (path / name / "file").read_bytes() == b"mine"
    assert (tmp_path / "target").read_bytes() == b"mine"
