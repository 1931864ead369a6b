"""Faults injected into the n-th system call of a workload, by ``strace`` or, for short writes, by a preloaded library.

A workload is traced undisturbed first: its calls, in order, each being the n-th of its kind. Then it is run again for
each of them, with the fault in just this call. ``strace`` counts each kind by itself, so a case is a kind and a number.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import oracle

HERE = Path(__file__).parent
HANG = 10  # seconds

WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2")
SYNCS = ("fsync", "fdatasync", "msync", "sync_file_range")
NAMES = ("rename", "renameat", "renameat2", "mkdir", "mkdirat", "link", "linkat")
REMOVES = ("unlink", "unlinkat", "rmdir")
SIZES = ("truncate", "ftruncate", "fallocate")
CHANGES = ("openat", *WRITES, *SYNCS, *NAMES, *REMOVES, *SIZES)
LOOKS = ("newfstatat", "statx", "fstat", "lstat", "stat", "access", "faccessat2", "getdents64", "read", "pread64", "fcntl")

_LINE = re.compile(r"^\d+ +(\w+)\((.*)")


class Call(NamedTuple):
    """The ``number``-th call of its kind."""

    kind: str
    number: int
    text: str


class Fault(NamedTuple):
    """``what`` is SIGKILL or the name of an errno; it strikes once, five times, or for ever."""

    call: Call
    what: str
    times: str = "once"

    def option(self) -> str:
        when = {"once": "", "five times": f"..{self.call.number + 4}", "for ever": "+"}[self.times]
        how = "signal=KILL" if self.what == "SIGKILL" else f"error={self.what}"
        return f"inject={self.call.kind}:{how}:when={self.call.number}{when}"

    def __str__(self) -> str:
        return f"{self.what} {self.times} at {self.call.kind} number {self.call.number}: {self.call.text[:150]}"


class Outcome(NamedTuple):
    """``status`` as in ``subprocess``; what the workload logged; its last words, if it had any; what was traced."""

    status: int
    hang: bool
    log: str
    result: dict[str, Any] | None
    calls: list[Call]
    struck: str  # the first call that the fault hit

    def problem(self) -> str:
        """Why this is no way to take an error; "" if it is one."""
        if self.hang:
            return f"it hung for {HANG} s"
        if self.status or self.result is None:
            return f"it died with status {self.status}"
        return str(self.result.get("wrong", ""))


@functools.cache
def why_not() -> str:
    """Why faults cannot be injected on this machine; "" where they can."""
    if sys.platform != "linux" or not shutil.which("strace"):
        return "injecting faults into system calls takes strace"
    done = subprocess.run(["strace", "-e", "inject=getpid:error=EIO:when=1..2", "true"], capture_output=True, text=True)
    if done.returncode:
        return f"strace does not work here: {done.stderr.strip()[-200:]}"
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        worker = stack.enter_context(Worker())
        try:
            worker.run({"do": "open", "path": f"{folder}/chest", "plan": "small"}, [])
        except OSError as error:
            return f"strace may not attach to processes here: {error}"
    return ""


class Worker:
    """A process that runs workloads, each in a child of its own."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "workloads.py"],
            cwd=HERE,
            env=oracle.environment(PYTHONHASHSEED="0", OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._process.communicate(timeout=2 * HANG)  # its requests are at an end, and so is it, after the last child
        finally:
            self._process.kill()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker has died: {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, request: dict[str, Any], options: list[str] | None = None, deadline: float = HANG) -> Outcome:
        """Do what is asked, traced with these options of ``strace``, or untraced (None).

        Raises:
            OSError: it cannot be traced.
        """
        self._say(json.dumps({**request, "deadline": deadline}))
        pid = self._hear()["pid"]
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace"
            with _attached(pid, trace, options) if options is not None else contextlib.nullcontext() as error:
                self._say("go")
                answer = self._hear()
            if error:
                raise OSError(error)
            text = trace.read_text(errors="replace") if options is not None else ""
        calls, struck = _calls(text)
        return Outcome(answer["status"], answer["hang"], answer["log"], answer["result"], calls, struck)

    def trace(self, request: dict[str, Any], kinds: tuple[str, ...]) -> list[Call]:
        """The calls of these kinds of a workload that nothing disturbs."""
        outcome = self.run(request, [_traced(kinds)])
        if problem := outcome.problem():
            raise RuntimeError(f"{request} does not even work undisturbed: {problem}")
        return [call for call in outcome.calls if _touches_files(call)]

    def inject(self, request: dict[str, Any], fault: Fault) -> Outcome:
        return self.run(request, [_traced((fault.call.kind,)), fault.option()])

    def check(self, path: Path, plan: str, written: str, final: list[Any] | None = None, holes: bool = False) -> str:
        """What is wrong with a folder, in a new process; "" if nothing is."""
        request = {"do": "check", "path": str(path), "plan": plan, "written": written, "final": final, "holes": holes}
        return self.run(request, deadline=60).problem()


def _traced(kinds: tuple[str, ...]) -> str:
    return "trace=" + ",".join(f"?{kind}" for kind in kinds)


@contextlib.contextmanager
def _attached(pid: int, trace: Path, options: list[str]) -> Iterator[str]:
    """``strace`` follows the process, from now on and to its end. Gives what keeps it from doing so."""
    command = ["strace", "-f", "-p", str(pid), "-o", str(trace)]
    for option in options:
        command += ["-e", option]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()  # it is stopped by now, and goes on with each of its calls being looked at
        try:
            yield "" if "attached" in line else line or "strace ended"
            process.communicate(timeout=60)  # its process has ended, so it does
        finally:
            process.kill()


def _touches_files(call: Call) -> bool:
    """Not the mappings that are memory only: when an allocator asks for more is up to it."""
    return call.kind != "mmap" or ", -1, 0)" not in call.text


def _calls(text: str) -> tuple[list[Call], str]:
    counts: Counter[str] = Counter()
    calls, struck = [], ""
    for line in text.splitlines():
        if found := _LINE.match(line):
            kind, rest = found.groups()
            counts[kind] += 1
            calls.append(Call(kind, counts[kind], rest))
            if "(INJECTED)" in line and not struck:
                struck = f"{kind}({rest}"
    return calls, struck


# --- short writes

SHORT = r"""
/* Lets the n-th write of this process (or each from there on) write half of what it is given. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
#include <sys/uio.h>
static long at, count;
static int ever;
void shorten(long n, int e) { at = n; ever = e; count = 0; }
long calls(void) { return count; }
static int now(void) { count++; return at && (count == at || (ever && count > at)); }
static size_t half(size_t n) { return n > 1 && now() ? n / 2 : n; }
#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *data, size_t n) { NEXT(write); return next(fd, data, half(n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t to) { NEXT(pwrite); return next(fd, data, half(n), to); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t to) { NEXT(pwrite64); return next(fd, data, half(n), to); }
/* Of several parts the first one, and half of it if it is alone. */
#define VECTOR(call, alone) if (n > 1 && now()) n = 1; else if (n == 1) return alone; return call
ssize_t writev(int fd, const struct iovec *v, int n) {
    NEXT(writev); VECTOR(next(fd, v, n), write(fd, v->iov_base, v->iov_len)); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t to) {
    NEXT(pwritev); VECTOR(next(fd, v, n, to), pwrite(fd, v->iov_base, v->iov_len, to)); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t to) {
    NEXT(pwritev64); VECTOR(next(fd, v, n, to), pwrite64(fd, v->iov_base, v->iov_len, to)); }
"""


def short_writes(folder: Path) -> Path | None:
    """The library, compiled into a folder; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        return None
    source, library = folder / "short.c", folder / "short.so"
    source.write_text(SHORT)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True)
    return library if not done.returncode and os.path.exists(library) else None
