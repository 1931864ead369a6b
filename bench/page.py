"""The page of all results, with its plots: `docs/performance.md` and what lies in `docs/performance/`."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from contestants import CONTESTANTS
from parts import FAMILIES, Part, all_parts
from plots import Bar, Line, bars, curves, number, strips
from processes import PROCESS_CONTESTANTS
from results import Cells, Results
from targets import against_lru, outcomes

CURVES = {
    "scaling": (
        ["fill", "read", "overwrite", "longest set", "longest get", "closing"],
        {"chest": "chest", "rocksdict": "c1", "LMDB, 1 transaction": "c2"},
    ),
    "opening": (
        ["open", "open + get + len", "close"],
        {
            "chest": "chest",
            "rocksdict": "c1",
            "LMDB, 1 transaction": "c2",
            "diskcache.Cache": "c3",
            "sqlitedict": "c4",
            "diskcache-rs": "c5",
        },
    ),
}
ABSENT = ("not here", "not measured")  # how the reasons begin that are no failures

INTRO = """# Performance

<!-- Drawn by bench/run.py from performance/results.json: change it there. -->

Chest beside the libraries one would use instead, and beside what the machine allows: measured in one run, taking turns, each
measurement a process of its own. Less is better everywhere. **Bold** is what is ahead of chest; the sentences below a table
say why. In *italics* is what is no library but a limit: a plain `dict`, LMDB in one transaction, files written by hand.

`survives` says what data survive once they are set / once the store is closed: `nothing`, `kill -9`, or a `power cut`. Who
promises less has less to do, so compare with those that promise the same. `-` is what a library cannot do, `failed` where it
failed.

To measure it yourself: `make bench` (about half an hour), or `make bench BENCH_ARGS=--quick` (minutes; the page is then
`build/bench/performance.md`). `python bench/run.py --help` says how to run parts of it. All rounds of all cells are in
[results.json](performance/results.json).
"""


class Notes:
    """Footnotes of one table, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def lines(self) -> list[str]:
        return [f"<sup>{i}</sup> {text.replace('|', '/').replace('<', '&lt;')}  " for i, text in enumerate(self.texts, 1)]


def survives(part: Part, name: str) -> str:
    if part.family == "processes" and name in PROCESS_CONTESTANTS:
        return PROCESS_CONTESTANTS[name][2]
    return CONTESTANTS[name].survives(part.family in ("arrays", "frames")) if name in CONTESTANTS else ""


def is_peer(part: Part, name: str) -> bool:
    """Neither chest in another guise nor a limit."""
    if name == part.ours or name in ("chest, scratch", "LMDB, 1 write a transaction"):
        return False
    return not (name in CONTESTANTS and CONTESTANTS[name].limit)


def ahead(results: Results, part: Part, name: str, column: str) -> bool:
    best, ours = results.best(part.name, name, column), results.best(part.name, part.ours, column)
    return name != part.ours and name != "chest, scratch" and best is not None and ours is not None and best < ours


def table(results: Results, part: Part, columns: list[tuple[str, str]]) -> list[str]:
    """Rows of contestants: the best of all rounds."""
    notes = Notes()
    cells = results.parts[part.name]
    has_promise = any(survives(part, name) for name in cells)
    heads = ["", *(["survives"] if has_promise else []), *(f"{column}, {unit}" for column, unit in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * (1 + has_promise) + "|---:" * len(columns) + "|"]
    absent = []
    for name in [*part.contestants, *(name for name in cells if name not in part.contestants)]:
        found = cells.get(name)
        if found is None:
            continue
        if found.failure.startswith(ABSENT) and not found.rounds:
            absent.append(f"{name} ({found.failure})")
            continue
        row = [name if is_peer(part, name) or name in (part.ours, "chest, scratch") else f"*{name}*"]
        if found.failure and not found.failure.startswith(ABSENT):
            row[0] += notes.mark(f"{name}: {found.failure}")  # it may have failed in a later round only
        row += [survives(part, name)] if has_promise else []
        for column, _ in columns:
            row.append(_cell(results, part, name, column, found, notes))
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *notes.lines()]
    if absent:
        lines += ["", "Not in this run: " + "; ".join(absent) + "."]
    return [*lines, ""]


def _cell(results: Results, part: Part, name: str, column: str, found: Cells, notes: Notes) -> str:
    best = found.best(column)
    if best is None:
        if column in found.notes:
            return "-" + notes.mark(found.notes[column])
        if found.failure.startswith(ABSENT):
            return "-" + notes.mark(found.failure)
        return "failed" + notes.mark(f"{name}: {found.failure}") if found.failure else ""
    text = number(best)
    return f"**{text}**" if ahead(results, part, name, column) else text


def losses(results: Results, part: Part) -> list[str]:
    """A sentence for each column in which a library is ahead."""
    lines = []
    for column in part.columns:
        rivals = [name for name in results.parts[part.name] if is_peer(part, name) and ahead(results, part, name, column.name)]
        if not rivals:
            continue
        ours = results.best(part.name, part.ours, column.name) or 0.0
        best = min(rivals, key=lambda name: results.best(part.name, name, column.name) or 0.0)
        theirs = results.best(part.name, best, column.name) or 0.0
        others = f" and {len(rivals) - 1} more" if len(rivals) > 1 else ""
        lines.append(f"- `{column.name}`: chest {number(ours)}, {best} {number(theirs)}{others}. {column.why}".rstrip())
    head = "Where a library is ahead, with the first of them:" if lines else "No library is ahead of chest here."
    return [head, "", *lines, *([""] if lines else [])]


def plot_of(results: Results, part: Part) -> str:
    panels = []
    for column in part.columns:
        rows = []
        for name in results.parts[part.name]:
            best, median = results.best(part.name, name, column.name), results.median(part.name, name, column.name)
            if best is None or median is None:
                continue
            peer = is_peer(part, name)
            kind = "chest" if name in (part.ours, "chest, scratch") else "limit" if not peer else "peer"
            if kind == "peer" and ahead(results, part, name, column.name):
                kind = "ahead"
            rows.append(Bar(name, best, median, kind))
        panels.append((f"{column.name}, {column.unit}", rows))
    panels = [(title, rows) for title, rows in panels if rows]
    return bars(panels, f"{FAMILIES[part.family][0]}: {part.title}") if panels else ""


def plot_curves(results: Results, family: str, parts: list[Part]) -> str:
    columns, kinds = CURVES[family]
    panels = []
    for column in columns:
        units = [c.unit for part in parts for c in part.columns if c.name == column]
        lines = []
        for name, kind in kinds.items():
            for small in (False, True):
                points = [
                    (float(part.keys), best)
                    for part in parts
                    if ("cache" in part.name) == small and (best := results.best(part.name, name, column)) is not None
                ]
                if points:
                    lines.append(Line(name + (", small page cache" if small else ""), points, kind, small))
        panels.append((f"{column}, {units[0]}", lines))
    return curves(panels, f"{FAMILIES[family][0]}: against the number of keys")


def measured(results: Results, part: Part) -> list[str]:
    """When, how and on what; more than one line where the contestants were measured in several runs."""
    runs: dict[str, list[str]] = {}
    for name, cells in results.parts[part.name].items():
        runs.setdefault(cells.run, []).append(name)
    lines = []
    most = max(runs, key=lambda run: len(runs[run]))
    for run, names in runs.items():
        facts: dict[str, Any] = results.runs.get(run, {})
        if not facts:
            continue
        who = "" if len(runs) == 1 else " (the others)" if run == most else f" ({'; '.join(names)})"
        commit = f" of {facts['commit']}" if facts.get("commit") else ""
        rounds = f"best of {facts['rounds']} rounds" if facts["rounds"] > 1 else "one round"
        lines.append(f"Measured {facts['date']}{who}, `{facts['command']}`{commit}, {rounds}: {machine_line(facts)}")
    return ["  \n".join(lines), ""]


def machine_line(facts: dict[str, Any]) -> str:
    memory = f", {facts['memory_gb']:g} GB" if facts.get("memory_gb") else ""
    load = facts.get("load_before")
    busy = f"; **the machine was busy: load {load:g}**" if load is not None and load > facts["cores"] / 4 else ""
    system = f"{facts['system']}, {facts['file_system']}, Python {facts['python']}"
    return f"{facts['cores']} cores ({facts['cpu']}){memory}, {system}{busy}."


def versions(results: Results) -> list[str]:
    """Of the libraries; a line for each set of them that runs had."""
    found: dict[str, list[str]] = {}
    for facts in results.runs.values():
        found.setdefault(", ".join(f"{name} {version}" for name, version in facts["versions"].items()), []).append(
            facts["date"]
        )
    lines = [f"{text}{'' if len(found) == 1 else f' ({min(dates)} to {max(dates)})'}  " for text, dates in found.items()]
    return ["## Versions", "", *lines]


def targets_table(results: Results) -> list[str]:
    lines = ["## Targets", "", "| target | at most | measured, best | median | met | on |", "|---|---:|---:|---:|---|---|"]
    for found in outcomes(results):
        unit = found.target.unit

        def shown(value: float | None, unit: str = unit) -> str:
            return "-" if value is None else f"{number(value)} {unit}"

        met = {None: "not measured", True: "yes", False: "**no**"}[found.met]
        cells = [found.target.text, shown(found.target.bound), shown(found.best), shown(found.median), met, found.where]
        lines.append("| " + " | ".join(cells) + " |")
    n_met = sum(found.met is True for found in outcomes(results))
    lines += ["", f"{n_met} of {len(outcomes(results))} are met. `x`: times what is named.", ""]
    return lines


def eviction(results: Results, part: Part, draw: Any) -> list[str]:
    """Policies against LRU: dots, means, and every trace and budget."""
    policies = {name: against_lru(results, part.name, name, results.best) for name in results.parts[part.name]}
    policies = {name: found for name, found in policies.items() if found and name != "LRU"}
    if not policies:
        return ["No results: LRU failed.", ""]
    rows = [(name, list(found.values()), geometric_mean(found.values())) for name, found in policies.items()]
    rows.sort(key=lambda row: row[2])
    label = "Cost against LRU; each dot a trace with a budget, the bar their geometric mean"
    lines = draw(part.name, strips(rows, label, "GDQ", 1.10))
    has_hits = any(c.startswith("hits: ") for cells in results.parts[part.name].values() for c in cells.rounds)
    ours = part.ours if part.ours in policies else next(iter(policies))
    heads = ["trace @ memory", *policies, *(["hits LRU", f"hits {ours}"] if has_hits else [])]
    lines += [
        "<details><summary>Every trace</summary>",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for trace in next(iter(policies.values())):
        cells = []
        for name, found in policies.items():
            ratio = found.get(trace)
            loses = name == ours and ratio is not None and ratio > 1
            cells.append("-" if ratio is None else f"**{ratio:.3f}**" if loses else f"{ratio:.3f}")
        if has_hits:
            hits = [results.best(part.name, name, f"hits: {trace}") for name in ("LRU", ours)]
            cells += ["-" if rate is None else f"{rate:.1f} %" for rate in hits]
        lines.append(f"| {trace} | " + " | ".join(cells) + " |")
    found = policies[ours]
    worse = sum(ratio > 1 for ratio in found.values())
    lines += ["", "</details>", ""]
    lines.append(
        f"{ours}: {number(geometric_mean(found.values()))} of LRU's cost on average, worst {max(found.values()):.2f} "
        f"({max(found, key=found.__getitem__)}); dearer than LRU in {worse} of {len(found)}"
        + (": where what comes next is what was last used, nothing beats LRU." if worse and part.exact else ".")
    )
    return [*lines, ""]


def write(results: Results, out: Path) -> None:
    """Draws the page and its plots of whatever parts there are; plots of parts that are gone are removed."""
    folder = out / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()

    def draw(name: str, drawing: str) -> list[str]:
        if not drawing:
            return []
        file = name.replace(" ", "-") + ".svg"
        (folder / file).write_text(drawing, encoding="utf-8")
        return [f"![{name}](performance/{file})", ""]

    lines = [INTRO, *targets_table(results)]
    parts = [part for name, part in all_parts().items() if name in results.parts]
    for family, (title, text) in FAMILIES.items():
        of_family = [part for part in parts if part.family == family]
        if not of_family:
            continue
        lines += [f"## {title}", "", text, ""]
        if family in CURVES and len(of_family) > 1:
            lines += draw(family, plot_curves(results, family, of_family))
        for part in of_family:
            lines += [f"### {part.title[0].upper()}{part.title[1:]}", "", *measured(results, part)]
            if family == "eviction":
                lines += eviction(results, part, draw)
                continue
            if family == "files":
                lines += eviction(results, part, draw)
                names = list(dict.fromkeys(c for cells in results.parts[part.name].values() for c in cells.rounds))
                lines += table(results, part, [(name, "s") for name in names])
                continue
            if family not in CURVES:
                lines += draw(part.name, plot_of(results, part))
            lines += table(results, part, [(column.name, column.unit) for column in part.columns])
            lines += losses(results, part)
    lines += versions(results)
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (out / "performance.md").write_text(text, encoding="utf-8")
