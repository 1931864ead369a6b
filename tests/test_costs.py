"""A guard against getting slower that counts instead of timing: transactions, pickles, system calls, bytes, allocations.

Each bound stands a little above what was counted when it was written. Whoever makes one larger says why.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chest import Chest, nbytes
from chest._hot import COMPILED
from chest._pagemap import written_pages

N = 5_000
TEXT = "0123456789" * 10
LIMIT = 1 << 20


class Counts(Counter[str]):
    """What a chest does from now on: transactions of its index, values that are pickled and unpickled."""

    def __init__(self, chest: Chest[Any, Any]) -> None:
        super().__init__()
        env, codec = chest._store.index._env, chest._store.codec  # type: ignore[attr-defined]
        begin = env.begin

        def counted_begin(*args: Any, **kwargs: Any) -> Any:
            self["write transactions" if kwargs.get("write") else "read transactions"] += 1
            return begin(*args, **kwargs)

        env.begin = counted_begin
        for name in ("dumps", "dumps_plain", "loads"):
            setattr(codec, name, self._counted("loads" if name == "loads" else "dumps", getattr(codec, name)))

    def _counted(self, name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(value: Any) -> Any:
            self[name] += 1
            return function(value)

        return counted


@pytest.fixture
def chest(tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=LIMIT, loose=0) as chest:
        yield chest


def fill(chest: Chest[Any, Any], n: int = N) -> None:
    for i in range(n):
        chest[f"key{i}"] = TEXT


def test_a_hit_asks_nobody_and_allocates_nothing(chest: Chest[Any, Any]) -> None:
    values = {f"key{i}": [i] for i in range(100)}
    chest.update(values)
    chest.sync()
    keys = list(values) * 10
    counts = Counts(chest)
    for key in keys:
        chest[key]
    grown = []
    for _ in range(5):  # other threads (of whoever runs the tests) may need some in between
        before = sys.getallocatedblocks()
        for key in keys:
            chest[key]
        grown.append(sys.getallocatedblocks() - before)
    assert min(grown) < 20
    assert counts == {}


def test_a_set_that_evicts_nothing_asks_nobody(chest: Chest[Any, Any]) -> None:
    counts = Counts(chest)
    fill(chest, 1000)
    fill(chest, 1000)
    assert counts == {}


def test_each_small_value_is_pickled_once_and_a_commit_takes_thousands(chest: Chest[Any, Any]) -> None:
    counts = Counts(chest)
    fill(chest)
    chest.sync()
    commits = N * (nbytes(TEXT) + nbytes("key1234")) / (LIMIT // 4)
    assert chest.stats().spills > 0
    assert counts["dumps"] == N
    assert counts["loads"] == 0
    assert counts["write transactions"] <= commits + 2
    assert counts["read transactions"] <= 3 * commits + 5


def test_an_overwritten_value_is_pickled_once_and_looked_up_in_the_commit_only(chest: Chest[Any, Any]) -> None:
    fill(chest)
    chest.flush()
    counts = Counts(chest)
    for i in range(N):
        chest[f"key{i * 7 % N}"] = TEXT
    chest.sync()
    assert counts["dumps"] == N
    assert counts["loads"] == 0
    assert counts["write transactions"] <= 6


@pytest.mark.parametrize("value", [TEXT, {"a": [1, 2]}], ids=["text", "record"])
def test_a_cold_read_is_one_transaction_and_one_unpickling(chest: Chest[Any, Any], value: Any) -> None:
    for i in range(500):
        chest[i] = pickle.loads(pickle.dumps(value))
    chest.flush()
    counts = Counts(chest)
    for i in range(500):
        chest[i]
    assert counts == {"read transactions": 500, "loads": 500}


def test_looking_for_a_key_reads_its_record_and_no_value(chest: Chest[Any, Any]) -> None:
    fill(chest, 500)
    chest.flush()
    counts = Counts(chest)
    assert sum(f"key{i}" in chest for i in range(1000)) == 500
    assert counts == {"read transactions": 1000}


def test_items_are_read_by_the_hundred(chest: Chest[Any, Any]) -> None:
    fill(chest)
    chest.flush()
    counts = Counts(chest)
    assert sum(1 for _ in chest.items()) == N
    assert counts["loads"] == N
    assert counts["read transactions"] <= 2 * N // 1000 + 10
    assert counts["write transactions"] == 0


@pytest.mark.parametrize("way", ["get_many", "prefetch"])
def test_many_keys_are_read_by_the_batch(chest: Chest[Any, Any], way: str) -> None:
    fill(chest, 1000)
    chest.flush()
    counts = Counts(chest)
    getattr(chest, way)([f"key{i}" for i in range(1000)])
    assert counts["loads"] == 1000
    assert counts["read transactions"] <= 1000 / 64 + 2


def test_what_was_only_read_and_cannot_change_is_not_pickled_again(chest: Chest[Any, Any]) -> None:
    fill(chest)
    chest.flush()
    for i in range(1000):
        chest[f"key{i}"]
    counts = Counts(chest)
    chest.flush()
    assert counts == {}


def test_what_was_only_read_is_pickled_once_to_see_that_it_has_not_changed(chest: Chest[Any, Any]) -> None:
    for i in range(200):
        chest[i] = [i]
    chest.flush()
    for i in range(200):
        chest[i]
    counts = Counts(chest)
    chest.flush()
    assert counts["dumps"] <= 200
    assert counts["write transactions"] == 0


class Refuses:
    asked = 0

    def __reduce__(self) -> str:
        Refuses.asked += 1
        raise TypeError("not today")


def test_a_value_that_cannot_be_written_is_not_tried_again_with_every_commit(chest: Chest[Any, Any]) -> None:
    chest["bad"] = Refuses()
    Refuses.asked = 0
    counts = Counts(chest)
    fill(chest, 20_000)
    assert counts["write transactions"] > 5
    assert 1 <= Refuses.asked <= 4
    del chest["bad"]


def test_len_and_opening_cost_the_same_however_many_keys_there_are(tmp_path: Path) -> None:
    found = []
    for n in (10, 20_000):
        path = tmp_path / str(n)
        with Chest[str, str](path=path, loose=0) as chest:
            fill(chest, n)
        with Chest[str, str](path=path, loose=0) as chest:
            counts = Counts(chest)
            assert len(chest) == n
            found.append((counts["read transactions"], len(os.listdir(path / ".keys"))))
    assert found[0] == found[1]


def test_an_entry_takes_no_more_memory_than_it_is_counted_with() -> None:
    from chest._hot import ENTRY_BYTES

    assert (256 if COMPILED else 480) >= ENTRY_BYTES


PROGRAM = """
import sys, numpy as np
from chest import Chest
path, n, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with Chest(path=path, available_memory=50_000_000, loose=0) as c:
    if what == "arrays":
        for i in range(n):
            c[f"a{i}"] = np.zeros(125_000)
        c.sync()
    elif what == "small":
        for i in range(n):
            c[f"k{i}"] = "x" * 100
        c.sync()
"""


def trace(tmp_path: Path, program: str, kinds: str, *args: object) -> list[str]:
    """The system calls of a program."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "log"
    command = ["strace", "-f", "-qq", "-e", f"trace={kinds}", "-o", str(log), sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=120)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    return [line.split(maxsplit=1)[1] for line in log.read_text(errors="replace").splitlines()]


def syscalls(tmp_path: Path, what: str, n: int) -> tuple[Counter[str], int]:
    """System calls of a program that writes n values, by name, and bytes that it wrote."""
    lines = trace(tmp_path, PROGRAM, "%file,%desc", tmp_path / f"{what}{n}", n, what)
    calls: Counter[str] = Counter()
    written = 0
    for line in lines:
        name = line.partition("(")[0]
        calls[name] += 1
        if name in ("write", "writev", "pwrite64", "pwritev"):
            written += int(line.rpartition("= ")[2].split()[0]) if "= " in line else 0
    return calls, written


def per_value(tmp_path: Path, what: str, few: int, many: int) -> tuple[dict[str, float], float]:
    """What each further value costs."""
    less, less_written = syscalls(tmp_path, what, few)
    more, more_written = syscalls(tmp_path, what, many)
    n = many - few
    return {name: (more[name] - less[name]) / n for name in more}, (more_written - less_written) / n


def test_an_array_is_one_file_synced_once_and_renamed_once(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    each, written = per_value(tmp_path, "arrays", 10, 30)
    assert written <= 1_000_000 * 1.02
    assert each["fsync"] + each.get("fdatasync", 0) <= 1.2
    assert each["openat"] <= 3
    assert sum(each[name] for name in each if name.startswith(("rename", "link"))) <= 1
    assert sum(each.values()) <= 30


def test_small_values_cost_no_system_call_of_their_own(tmp_path: Path) -> None:
    each, written = per_value(tmp_path, "small", 1_000, 5_000)
    assert sum(each.values()) <= 0.2
    assert written <= 400


READING = """
import os, sys
import numpy as np
from chest import Chest
path, n = sys.argv[1], int(sys.argv[2])
with Chest(path=path, loose=0) as c:
    for i in range(n):
        c[f"a{i}"] = np.full(1_000_000, float(i))
for look in (os.getpid, os.getppid):  # what is found out once is found out by the first
    with Chest(path=path, available_memory=n // 2 * 8_100_000, loose=0) as c:
        for i in range(n):
            look()
            assert c[f"a{i}"][0] == i
        look()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's system calls")
def test_a_first_touch_opens_one_file_and_what_was_only_read_leaves_by_one_look(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    if written_pages(0, 0) is None:
        pytest.skip("the kernel does not tell which pages were written")
    n = 12
    reads: list[list[str]] = []
    for line in trace(tmp_path, READING, "%file,%desc,getppid", tmp_path / "c", n):
        if line.startswith("getppid"):
            reads.append([])
        elif reads and not line.startswith("mmap"):  # the interpreter maps memory of its own, too
            name = line.partition("(")[0].replace("newfstatat", "fstat")
            if name != "fstat" or reads[-1][-1:] != ["fstat"]:  # since 3.13 Python maps, and has a look of its own
                reads[-1].append(name)
    touch, look = ["openat", "fstat", "close"], ["openat", "ioctl", "close"]
    if any("pread64" in read for read in reads):  # before Linux 6.7
        look[1] = "pread64"
    n_left = [len(read) // 3 - 1 for read in reads[:n]]
    assert reads[:n] == [touch + look * number for number in n_left]
    assert sum(n_left) >= n // 2
