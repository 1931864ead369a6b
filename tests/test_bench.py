"""The benchmarks run: every workload in the smallest size, peers that fail, results that are merged, and the page."""

from __future__ import annotations

import importlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DUMB = "shelve, dumb"

# Of each family: the sizes in which its workloads run here, and one contestant beside chest that is always there.
SMALLEST: dict[str, tuple[list[dict[str, Any]], str]] = {
    "pairs": ([{"n": 60}], DUMB),
    "scaling": ([{"n": 60}], "LMDB, 1 transaction"),
    "opening": ([{"n": 60}], DUMB),
    "arrays": ([{"n": 4, "megabytes": 1}], "write + fsync, np.load mapped"),
    "frames": ([{"kind": "frames", "n": 2}], DUMB),
    "nested": ([{"kind": "nested", "n": 4}], DUMB),
    "limit": ([{"kind": kind, "megabytes": 1} for kind in ("small", "arrays", "nested")], "dict"),
    "processes": (
        [
            {"work": "count", "n_processes": 2, "n": 5, "n_keys": 20},
            {"work": "mixed", "n_processes": 1, "n": 200, "n_keys": 20},
        ],
        "LMDB, 1 write a transaction",
    ),
    "eviction": ([{"n": 200}], "LRU"),
    "files": ([{"n": 200}], "LRU"),
}


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the benchmarks, which are scripts and no package: their names are free again afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module
    for path in (ROOT / "bench").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(name="run")
def _run(bench: Any) -> ModuleType:
    return bench("run")


def _part(bench: Any, family: str) -> Any:
    return next(part for part in bench("parts").all_parts().values() if part.family == family)


def test_every_family_of_parts_is_run_here(bench: Any) -> None:
    parts = bench("parts")
    assert {part.family for part in parts.all_parts().values()} == SMALLEST.keys() == parts.FAMILIES.keys()


def test_a_part_is_chosen_by_its_name_or_its_beginning(bench: Any, run: ModuleType) -> None:
    known = bench("parts").parts("default")
    assert run.chosen(known, []) == known
    assert [part.name for part in run.chosen(known, ["scaling 100000", "arrays"])] == [
        "scaling 100000",
        "arrays 1",
        "arrays 32",
    ]


def test_a_larger_scale_has_every_contestant_that_a_smaller_one_knows(bench: Any) -> None:
    parts = bench("parts")
    known = {*bench("contestants").CONTESTANTS, *bench("processes").PROCESS_CONTESTANTS, *bench("eviction").POLICIES}
    for part in parts.all_parts().values():
        assert {*part.contestants, part.ours} <= known, part.name
        assert part.ours in part.contestants, part.name


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALLEST)
def test_a_workload_fills_every_column_for_chest_and_a_peer(family: str, bench: Any, run: ModuleType, place: Path) -> None:
    if family in ("arrays", "frames", "limit"):
        pytest.importorskip("numpy")
    if family == "frames":
        pytest.importorskip("pandas")
    part = _part(bench, family)
    sizes, peer = SMALLEST[family]
    workload = part.runs[0][0]
    part = part._replace(runs=[(workload, size) for size in sizes])
    cells = run.measure(part, [part.ours, peer], 1, 120, str(place), "now")
    wanted = {column.name for column in part.columns}
    if family == "processes":
        wanted = {f"{size['work']}, {size['n_processes']}" for size in sizes}
    for name, found in cells.items():
        assert not found.failure, name
        assert found.rounds, name
        assert wanted <= found.rounds.keys() | found.notes.keys(), name
    assert wanted <= cells[part.ours].rounds.keys(), "chest can do all of it"
    assert not list(place.iterdir()), "a run leaves nothing behind"


def test_a_contestant_that_fails_or_takes_too_long_says_so_and_ends_nothing(run: ModuleType, tmp_path: Path) -> None:
    rows, failure = run.measure_once("pairs", "no such library", str(tmp_path / "a"), {"n": 10}, 60)
    assert rows == []
    assert failure == "KeyError: 'no such library'"
    assert run.measure_once("pairs", "dict", str(tmp_path / "b"), {"n": 10}, 0.01) == ([], "took longer than 0.01 s")


def test_chest_023_is_not_mistaken_for_the_chest_of_today(
    bench: Any, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench("contestants").CONTESTANTS["chest 0.2.3"]._replace(path=str(tmp_path))
    monkeypatch.setitem(bench("contestants").CONTESTANTS, "chest 0.2.3", old)
    rows, failure = run.measure_once("pairs", "chest 0.2.3", str(tmp_path / "c"), {"n": 10}, 60)
    assert rows == []
    assert failure.startswith("not here: this is chest 1."), "it is what PYTHONPATH has, if the old one is not fetched"


def _stored(bench: Any, path: Path) -> Any:
    """Results of two parts: chest ahead and behind, a crash in the middle, something it cannot do, one that is not here."""
    module = bench("results")
    results = module.Results(path)

    def cells(rounds: dict[str, list[float]], notes: dict[str, str] | None = None, failure: str = "") -> Any:
        return module.Cells("run", {"run": "run", "rounds": rounds, "notes": notes or {}, "failure": failure})

    results.runs["run"] = {
        "date": "2026-01-01 12:00",
        "command": "python bench/run.py",
        "rounds": 2,
        "cores": 2,
        "cpu": "a processor",
        "memory_gb": 8.0,
        "system": "Linux 6",
        "file_system": "ext4",
        "python": "3.11.7",
        "versions": {"chest": "1.0"},
        "load_before": 0.0,
    }
    results.replace(
        "pairs 10000",
        {
            "chest": cells({"fill": [10.0, 12.0], "hot read": [0.1, 0.2], "len": [5.0, 5.0]}),
            "rocksdict": cells({"fill": [5.0, 6.0], "hot read": [3.0, 3.0]}, {"len": "it does not count"}),
            "sqlitedict": cells({"fill": [80.0]}, failure="OSError: disk | full"),
            "shelve, gnu": cells({}, failure="not here: No module named '_gdbm'"),
        },
    )
    results.replace(
        "eviction 10000", {name: cells({"loop @ 10%": [c]}) for name, c in (("LRU", 2.0), ("GDQ", 1.5), ("FIFO", 2.2))}
    )
    results.replace("scaling 10000", {"chest": cells({"fill": [9.0, 10.0]})})
    results.replace("scaling 100000", {"chest": cells({"fill": [9.0, 11.0]})})
    return results


def test_what_is_measured_again_replaces_its_cells_and_no_others(bench: Any, tmp_path: Path) -> None:
    module = bench("results")
    _stored(bench, tmp_path / "results.json").save()
    results = module.Results(tmp_path / "results.json")
    again = module.Cells("later")
    again.add([("fill", 4.0), ("len", "it forgot how")])
    results.runs["later"] = dict(results.runs["run"], date="2026-02-02")
    results.replace("pairs 10000", {"chest": again})
    results.save()
    results = module.Results(tmp_path / "results.json")
    assert results.best("pairs 10000", "chest", "fill") == 4.0
    assert results.best("pairs 10000", "chest", "hot read") is None, "of the run before"
    assert results.best("pairs 10000", "rocksdict", "fill") == 5.0
    assert results.median("pairs 10000", "rocksdict", "fill") == 5.5
    assert set(results.runs) == {"run", "later"}
    assert not (tmp_path / "results.new").exists()


def test_the_page_marks_where_chest_loses_and_who_failed(bench: Any, tmp_path: Path) -> None:
    bench("page").write(_stored(bench, tmp_path / "performance" / "results.json"), tmp_path)
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    table = text[text.index("### 10,000 small values") : text.index("## From ten")]
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert "| 10.0 |" in rows["chest"]
    assert "| **5.00** |" in rows["rocksdict"]
    assert "| 3.00 |" in rows["rocksdict"], "slower is not bold"
    assert "| -<sup>1</sup> |" in rows["rocksdict"]
    assert "it does not count" in text
    assert rows["sqlitedict<sup>2</sup>"].count("failed") > 5
    assert "OSError: disk / full" in text, "a bar would end the cell"
    assert "shelve, gnu" not in rows
    assert "Not in this run: shelve, gnu (not here: No module named '_gdbm')." in text
    assert "- `fill`: chest 10.0, rocksdict 5.00. It appends to a log" in text
    assert "Measured 2026-01-01 12:00, `python bench/run.py`, best of 2 rounds: 2 cores (a processor)" in text
    assert "| a hit | 0.15 us | 0.10 us | 0.15 us | yes | 10,000 small values |" in text
    assert "against rocksdict | 0.80 x | 2.00 x | 2.00 x | **no** |" in text
    assert "| I/O cost of the eviction policy against LRU, mean | 0.92 x | 0.75 x | 0.75 x | yes |" in text
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        root = ElementTree.fromstring((tmp_path / image).read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")
        assert "prefers-color-scheme:dark" in (root[0].text or "")
    assert {path.name for path in tmp_path.glob("performance/*.svg")} == {
        "pairs-10000.svg",
        "scaling.svg",
        "eviction-10000.svg",
    }


def test_a_page_without_results_is_a_page(bench: Any, tmp_path: Path) -> None:
    bench("page").write(bench("results").Results(tmp_path / "none.json"), tmp_path)
    assert "0 of 16 are met" in (tmp_path / "performance.md").read_text(encoding="utf-8")


def test_the_published_page_shows_the_published_results(bench: Any, tmp_path: Path) -> None:
    bench("page").write(bench("results").Results(ROOT / "docs" / "performance" / "results.json"), tmp_path)
    drawn = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.*")}
    for name, text in drawn.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"draw it with: python bench/run.py --page ({name})"
    assert {path.name for path in (ROOT / "docs").glob("performance/*.svg")} == {
        path.name for path in drawn if path.suffix == ".svg"
    }


def test_a_quick_run_of_a_part_measures_and_draws_it(run: ModuleType, tmp_path: Path, place: Path) -> None:
    code = run.main(["--quick", "scaling 10000", "--only", "LMDB", "--out", str(tmp_path / "out"), "--dir", str(place)])
    assert code == 0
    text = (tmp_path / "out" / "performance.md").read_text(encoding="utf-8")
    assert "### 10,000 values of 100 bytes" in text
    assert "| chest | nothing / power cut |" in text
    assert "`python bench/run.py 'scaling 10000' --quick --only=LMDB`" in text
    assert run.main(["no such part"]) == 2
