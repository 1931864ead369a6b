"""Put the counts of a torture run into docs/reliability.md.

    python scripts/reliability.py COUNTS PAGE

COUNTS has a line of JSON for each sweep of the tests in tests/faults: {"what": ..., "tried": ..., "survived": ...}, and
"control": true where a fault was built in that the tests must catch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

BEGIN, END = "<!-- counts: begin -->\n", "<!-- counts: end -->\n"


def machine() -> str:
    """What these counts were seen on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    kernel = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{os.cpu_count()} cores ({model}), {kernel}, Python {platform.python_version()}"


def table(lines: list[str]) -> str:
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    controls: set[str] = set()
    for line in lines:
        found = json.loads(line)
        tried[found["what"]] += found["tried"]
        survived[found["what"]] += found["survived"]
        if found.get("control"):
            controls.add(found["what"])
    rows = [f"`make torture`, {time.strftime('%Y-%m-%d')}, {machine()}."]
    rows += ["", "| faults | tried | survived |", "|---|---:|---:|"]
    rows += [f"| {what} | {tried[what]:,} | {survived[what]:,} |" for what in sorted(tried.keys() - controls)]
    rows += ["", "| controls: chest with a fault built in, which the tests must catch | caught |", "|---|---:|"]
    rows += [f"| {what} | {'yes' if survived[what] < tried[what] else 'NO'} |" for what in sorted(controls)]
    return "\n".join(rows) + "\n"


def main(counts: str, page: str) -> None:
    lines = [line for line in Path(counts).read_text(encoding="utf-8").splitlines() if line]
    text = Path(page).read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    found = table(lines)
    Path(page).write_text(f"{head}{BEGIN}\n{found}\n{END}{tail}", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
