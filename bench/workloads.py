"""All workloads by name, found only when they run: a process of chest 0.2.3 must not import what needs today's chest."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator

from measuring import NotMeasuredError, Row

WORKLOADS = {
    "pairs": "pairs",
    "opening": "pairs",
    "scaling": "pairs",
    "arrays": "large",
    "objects": "large",
    "limit": "large",
    "simulated": "eviction_parts",
    "with_files": "eviction_parts",
    "processes": "processes",
}


def workload(name: str) -> Callable[..., Iterator[Row]]:
    found: Callable[..., Iterator[Row]] = getattr(importlib.import_module(WORKLOADS[name]), name)
    return found


def work(task: str) -> None:
    """Runs one workload for one contestant and prints a line for each number as soon as it is known.

    So a contestant that fails in the middle keeps what it had until then. What is not there, and no failure, is said
    in a last line.
    """
    name, contestant, folder, sizes = json.loads(task)
    try:
        import files  # noqa: F401 - each registers its contestants
        import stores  # noqa: F401

        for row in workload(name)(contestant, folder, **sizes):
            print(json.dumps(row), flush=True)
    except ImportError as error:
        print(json.dumps([None, f"not here: {error}"]), flush=True)
    except NotMeasuredError as error:
        print(json.dumps([None, f"not measured: {error}"]), flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
