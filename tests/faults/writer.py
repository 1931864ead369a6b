"""A process that writes to a chest until it is killed, and logs what it begins and what it may rely on.

    python writer.py PATH SEED FIRST_WRITER WRITERS MEMORY IN_PLACE ACK_EARLY [ATOMIC]

Each of the ``WRITERS`` threads has keys of its own. ``ACK_EARLY`` acknowledges before the flush: a liar, to try the
oracle on. ``ATOMIC``: each generation is a transaction.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from typing import Any

import oracle

from chest import Chest


class Session:
    """A chest, and what its writers share."""

    def __init__(self, path: str, seed: int, memory: int, in_place: bool, ack_early: bool, atomic: bool) -> None:
        self.path, self.seed, self.memory = path, seed, memory
        self.in_place, self.ack_early, self.atomic = in_place, ack_early, atomic
        self.chest: Chest[Any, Any] = Chest(path=path, available_memory=memory)

    def log(self, text: str) -> None:
        os.write(1, f"{text}\n".encode())

    def save(self, rng: random.Random, alone: bool) -> None:
        how = rng.randrange(8)
        if how < 4:
            self.chest.flush()
        elif how < 7 or not alone:
            self.chest.sync()
        else:
            self.chest.close()
            self.chest = Chest(path=self.path, available_memory=self.memory)

    def write(self, writer: int, alone: bool) -> None:
        state: oracle.State = {}
        for generation in range(1_000_000):
            self.log(f"begin {writer} {generation}")
            with self.chest.transaction() if self.atomic else contextlib.nullcontext():
                for step in oracle.steps(self.seed, writer, generation, in_place=self.in_place):
                    before = state.get(step.tag.key)
                    if oracle.apply(state, step):
                        self.do(step, before)
                if self.atomic and self.ack_early:
                    self.log(f"ack {writer} {generation}")
            if not self.atomic:
                if self.ack_early:
                    self.log(f"ack {writer} {generation}")
                self.save(random.Random(f"{self.seed}/{writer}/{generation}/save"), alone)
            if not self.ack_early:
                self.log(f"ack {writer} {generation}")

    def do(self, step: oracle.Step, before: oracle.Tag | None) -> None:
        key = oracle.key(step.tag.writer, step.tag.key)
        if step.kind == "set":
            self.chest[key] = oracle.value(step.tag)
        elif step.kind == "delete":
            del self.chest[key]
        else:
            found = self.chest[key]
            if oracle.whole(found, step.tag.writer, step.tag.key) != before:
                raise oracle.Wrong(f"{key!r:.60} is {oracle.tag_of(found)}, and was set to {before}")
            if step.kind == "change":
                oracle.change(found, step.tag)


def main(path: str, *numbers: str) -> None:
    seed, first, writers, memory, in_place, ack_early, atomic = map(int, (*numbers, "0")[:7])
    session = Session(path, seed, memory, bool(in_place), bool(ack_early), bool(atomic))

    def run(writer: int) -> None:
        try:
            session.write(writer, writers == 1)
        except BaseException as error:
            session.log(f"WRONG {type(error).__name__}: {error}".replace("\n", " "))
            os._exit(3)

    threads = [threading.Thread(target=run, args=(writer,)) for writer in range(first + 1, first + writers)]
    for thread in threads:
        thread.start()
    run(first)


main(*sys.argv[1:])
