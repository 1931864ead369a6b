"""The oracle of the crash tests: what a chest must hold, worked out without storing a copy of it.

Every value derives from who wrote it, under which of his keys, and at which step, so a value can be told whole from
torn, right from swapped, and new from old by looking at it alone. What a writer does in a generation derives from a
seed, so the state after any step can be worked out again. The writer logs ``begin g`` before generation ``g``, and
``ack g`` once a flush has returned after it; the log goes to a pipe, outside of the chest, and survives the writer.

The checks: what was acknowledged is there; nothing is newer than ``begin``; every value is whole; nothing refers to a
missing file; the state is one that a writer went through; writing works; what a crash leaves lying about is gone after
an open.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chest import Chest

SOURCES = str(Path(__file__).resolve().parents[2] / "src")
N_KEYS = 14  # of each writer
LARGE = (1, 3, 4)  # values of these kinds, number modulo 7, are files


class Wrong(AssertionError):
    """The chest does not hold what it must hold."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a subprocess that is to import this chest and the modules beside this one."""
    paths = [SOURCES, str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "", **more}


# --- values


class Tag(NamedTuple):
    """Where a value comes from: the writer, his key, the generation, and the step within it."""

    writer: int
    key: int
    generation: int
    step: int


def key(writer: int, number: int) -> Any:
    """A writer's key: of every kind that takes a way of its own to the disk."""
    kinds: list[Any] = [
        f"word{writer}x{number}",
        ("pair", writer, number),
        writer * 1000 + number,
        f"../{writer}/{number}",
        f"{writer}{number}" * 300,
        (f"W{writer}", f"n{number}"),
    ]
    return kinds[number % len(kinds)]


def value(tag: Tag) -> Any:
    """The one value with this tag."""
    rng = np.random.default_rng(abs(hash(tuple(tag))))
    head = [int(part) for part in tag]
    match tag.key % 7:
        case 0:
            return (*head, "small" * (tag.step % 9))
        case 1:
            return np.concatenate([np.array(head), rng.integers(0, 1 << 40, 20_000)])  # 160 KB: a file
        case 2:
            return [head, rng.integers(0, 99, 50).tolist()]
        case 3:
            return f"{head} " + chr(97 + tag.step % 26) * 90_000  # a file without a buffer
        case 4:
            return {"head": head, "a": rng.random(9_000), "b": rng.random(12_000)}  # two payloads
        case 5:
            return {"head": head, "text": "t" * (tag.generation % 50)}
        case _:
            return np.concatenate([np.array(head), rng.integers(0, 1 << 40, 60)])


def tag_of(found: Any) -> Tag:
    """What a value says of itself, true or not."""
    head: Iterable[Any]
    if isinstance(found, np.ndarray):
        head = found[:4].tolist()
    elif isinstance(found, str):
        head = [int(part) for part in found[1 : found.index("]")].split(",")]
    elif isinstance(found, dict):
        head = found["head"]
    elif isinstance(found, list):
        head = found[0]
    else:
        head = found[:4]
    return Tag(*head)


def change(found: Any, tag: Tag) -> bool:
    """Change a value in place into the one with this tag; False where it cannot be changed."""
    new = value(tag)
    if isinstance(found, (np.ndarray, list)):
        found[:] = new
    elif isinstance(found, dict):
        for name, part in new.items():
            if isinstance(part, np.ndarray):
                found[name][:] = part
            else:
                found[name] = part
    else:
        return False
    return True


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def whole(found: Any, writer: int, number: int) -> Tag:
    """The tag of a value, which must be all that this tag stands for."""
    try:
        tag = tag_of(found)
    except Exception as error:
        raise Wrong(f"the value of {key(writer, number)!r:.60} is torn: {found!r:.200}") from error
    if (tag.writer, tag.key) != (writer, number):
        raise Wrong(f"{key(writer, number)!r:.60} holds the value of another key: {tag}")
    if not same(found, value(tag)):
        raise Wrong(f"the value of {key(writer, number)!r:.60} is torn: it begins as {tag} and is not that")
    return tag


# --- what a writer does


class Step(NamedTuple):
    kind: str  # "set", "change", "delete" or "read"
    tag: Tag


State = dict[int, Tag]  # key number -> the value it has


def steps(seed: int, writer: int, generation: int, *, in_place: bool) -> list[Step]:
    """What a writer does in a generation. A change or deletion of a key that is not there is left out by ``apply``."""
    rng = random.Random(f"{seed}/{writer}/{generation}")
    kinds = ["set"] * 5 + ["delete"] * 2 + ["read"] * 2 + ["change"] * 3 * in_place
    return [Step(rng.choice(kinds), Tag(writer, rng.randrange(N_KEYS), generation, step)) for step in range(rng.randint(1, 14))]


def apply(state: State, step: Step) -> bool:
    """Do a step to the model; False if there is nothing to do."""
    number = step.tag.key
    if step.kind == "set" or (step.kind == "change" and number in state and number % 7 not in (0, 3)):
        state[number] = step.tag
        return True
    if step.kind == "delete" and number in state:
        del state[number]
        return True
    return step.kind == "read" and number in state


def replay(seed: int, writer: int, generations: int, *, in_place: bool) -> State:
    """The state after so many generations."""
    state: State = {}
    for generation in range(generations):
        for step in steps(seed, writer, generation, in_place=in_place):
            apply(state, step)
    return state


# --- the log


class Run(NamedTuple):
    """One life of a writing process, and the log that it left.

    ``spills``: its memory was too small for its values. ``atomic``: each generation was a transaction.
    """

    seed: int
    writers: range
    in_place: bool
    spills: bool
    log: str
    atomic: bool = False


class Progress(NamedTuple):
    """How far a writer has certainly come, and how far he may have come: numbers of generations."""

    acknowledged: int
    begun: int


def progress(log: str, writer: int) -> Progress:
    acknowledged = begun = 0
    for line in log.split("\n")[:-1]:  # the last one may be cut off
        word, *numbers = line.split()
        if word == "WRONG":
            raise Wrong(line)
        who, generation = map(int, numbers)
        if who == writer:
            if word == "ack":
                acknowledged = generation + 1
            else:
                begun = generation + 1
    return Progress(acknowledged, begun)


# --- the check


def _actual(chest: Chest[Any, Any], writer: int) -> State:
    """What a chest holds of a writer; every value is looked at."""
    state: State = {}
    for number in range(N_KEYS):
        name = key(writer, number)
        if name in chest:
            if number % 7 in LARGE:
                _check_file(chest, name)
            state[number] = whole(chest[name], writer, number)
        else:
            default = object()
            if chest.get(name, default) is not default:
                raise Wrong(f"{name!r:.60} is not in the chest and yet has a value")
    return state


def _check_file(chest: Chest[Any, Any], name: Any) -> None:
    file = Path(chest.key_to_filename(name))
    if not file.is_file():
        raise Wrong(f"{name!r:.60} is in the index and its file is not there: {file}")
    if ".keys" in file.relative_to(chest.path).parts:
        raise Wrong(f"the file of {name!r:.60} has not got its own name: {file}")


def _possible(run: Run, writer: int, done: Progress) -> Iterator[State]:
    """The states that a writer went through since the last acknowledged flush, as others may see them."""
    state = replay(run.seed, writer, done.acknowledged, in_place=run.in_place)
    yield dict(state)
    for generation in range(done.acknowledged, done.begun):
        for step in steps(run.seed, writer, generation, in_place=run.in_place):
            apply(state, step)
            if not run.atomic:
                yield dict(state)
        yield dict(state)


def check(chest: Chest[Any, Any], runs: Iterable[Run]) -> None:
    """The chest holds what its writers' logs say it must.

    Without spills, and with transactions, the state of each writer must be one that he went through as a whole: a prefix
    of his steps, no hole. A spill writes what leaves memory and not what stays, so with spills that holds for each key by
    itself.
    """
    n_keys = 0
    for run in runs:
        for writer in run.writers:
            actual = _actual(chest, writer)
            n_keys += len(actual)
            _check_writer(run, writer, actual)
    _check_views(chest, n_keys)


def _check_writer(run: Run, writer: int, actual: State) -> None:
    done = progress(run.log, writer)
    possible = list(_possible(run, writer, done))
    if run.atomic or not run.spills:
        if actual not in possible:
            raise Wrong(f"writer {writer}, {done}: found {actual}, which was never the state since {possible[0]}")
        return
    for number in range(N_KEYS):
        tag = actual.get(number)
        if tag not in [state.get(number) for state in possible]:
            raise Wrong(f"{key(writer, number)!r:.60}: found {tag}, acknowledged {possible[0].get(number)}, {done}")


def _check_views(chest: Chest[Any, Any], n_keys: int) -> None:
    listed = list(chest)
    if not len(listed) == len(set(listed)) == len(chest) == n_keys:
        raise Wrong(f"{n_keys} keys have values, {len(listed)} are listed, len is {len(chest)}")
    if listed[::-1] != list(reversed(chest)):
        raise Wrong("the keys come in another order backwards")


def files(path: Path) -> set[str]:
    """All files below a folder, by their relative path, but for those of the index."""
    found = set()
    for folder, _, names in os.walk(path):
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
            if relative.startswith((".keys/new/owner-", ".keys/new/claim-")) and f"-{os.getpid()}-" in name:
                continue  # the mark of a living process, which is this one
            if not relative.startswith(".keys/") or relative.startswith(".keys/new/"):
                found.add(relative)
    return found


def check_tidy(chest: Chest[Any, Any]) -> None:
    """What crashes have left is gone: to be called right after an open."""
    present = files(Path(chest.path))
    if extra := present - set(chest._store.labels()):
        raise Wrong(f"left lying about: {sorted(extra)[:9]}")
    if notes := chest._store.index.notes():
        raise Wrong(f"{len(notes)} notes are left to be dealt with")


def check_writable(path: Path) -> None:
    """Work goes on: something small and something large is set, found by the next open, and deleted again."""
    large = np.arange(30_000)
    with Chest(path=path) as chest:
        before = list(chest)
        chest["after the crash"], chest[("after", "it")] = [1, 2], large
        chest.flush()
    with Chest(path=path) as chest:
        if chest["after the crash"] != [1, 2] or not same(chest["after", "it"], large):
            raise Wrong("what was set after the crash is not there")
        del chest["after the crash"], chest["after", "it"]
        if list(chest) != before:
            raise Wrong("writing after the crash has changed other keys")


def check_folder(path: Path, runs: Iterable[Run]) -> None:
    """Everything that must hold for a folder that a crash has left."""
    for _ in range(2):  # what the first open repairs, the second finds
        with Chest(path=path) as chest:
            check_tidy(chest)
            check(chest, runs)
    check_writable(path)
    with Chest(path=path) as chest:
        check_tidy(chest)
        check(chest, runs)
