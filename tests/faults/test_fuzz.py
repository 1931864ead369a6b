"""Fuzzing of all that reads what lies on disk: documented errors only, and no value that was not written.

Hypothesis makes up the damage everywhere. Where the package atheris is installed the same targets are fuzzed with its
coverage as a guide, which finds its way past checks that random damage fails.
"""

from __future__ import annotations

import hmac
import importlib.util
import io
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz
import oracle
import pytest
from counts import count
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from chest import _keys, _pickled, _valuefile
from chest.engines import _lmdb
from chest.errors import CorruptError, LoadError

pytestmark = pytest.mark.torture

HERE = Path(__file__).parent
FULL_S = 60  # of each target: seven minutes in all

LOOK = settings(database=None, suppress_health_check=[HealthCheck.too_slow])

Scale = Callable[[int, int], int]

steps = st.tuples(st.integers(0, 8), st.integers(0, 255), st.sampled_from([255, 255, 255, 0, 0, 1, 254]), st.integers(0, 255))
programs = st.lists(steps, min_size=1, max_size=6).map(lambda found: b"".join(map(bytes, found)))
damages = {
    "value_file": st.one_of(
        st.tuples(st.integers(0, len(fuzz.FILES) - 1), programs).map(lambda t: bytes([128 | t[0]]) + t[1]),
        st.binary(max_size=200),
    ),
    "record": st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3), programs).map(lambda t: bytes(t[:2]) + t[2]),
        st.tuples(st.integers(0, 3), st.integers(4, 5), st.binary(max_size=60)).map(lambda t: bytes(t[:2]) + t[2]),
    ),
    "reference": st.one_of(
        st.tuples(st.sampled_from(fuzz.REFERENCES), programs).map(lambda t: fuzz.mutate(*t)), st.binary(max_size=60)
    ),
    "safe": st.one_of(
        st.tuples(st.sampled_from(fuzz.SAFE_SEEDS or [b""]), programs).map(lambda t: fuzz.mutate(*t)), st.binary(max_size=60)
    ),
    "allowed": st.one_of(
        st.tuples(st.sampled_from(fuzz.PICKLES), programs).map(lambda t: fuzz.mutate(*t)), st.binary(max_size=60)
    ),
    "envelope": st.one_of(
        st.tuples(st.integers(0, 127), programs).map(lambda t: bytes([128 | t[0]]) + t[1]), st.binary(max_size=200)
    ),
    "name": st.one_of(
        st.tuples(st.sampled_from(fuzz.NAMES), programs).map(lambda t: fuzz.mutate(*t)),
        st.tuples(st.sampled_from([*"sbiINEfqcptzdDATVLur/\\eghox"]), st.binary(max_size=40)).map(
            lambda t: t[0].encode() + t[1]
        ),
    ),
}


@pytest.mark.parametrize("target", damages)
def test_damage_is_refused_and_never_taken_for_what_was_written(target: str, scale: Scale) -> None:
    if not fuzz.INPUTS[target]:
        pytest.skip("the package msgspec is not installed")
    n = 0
    with fuzz.aimed_at(target) as aimed:
        for data in fuzz.INPUTS[target]:
            aimed(data)

        @settings(LOOK, max_examples=scale(250, 10_000))
        @given(damages[target])
        def attempt(data: bytes) -> None:
            nonlocal n
            n += 1
            aimed(data)

        attempt()
    count(f"made up by hypothesis: {target}", n, n)


def test_a_run_guided_by_coverage_finds_no_way_past_the_checks(tmp_path: Path, scale: Scale) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("the package atheris is not installed")
    for target in list(fuzz.INPUTS)[: scale(1, 7)]:
        _run_guided(target, tmp_path / target, scale(1, FULL_S))


def _run_guided(target: str, folder: Path, seconds: int) -> None:
    folder.mkdir()
    fuzz.write_inputs(target, folder / "inputs")
    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2000",
        "-max_len=3000",
        f"-artifact_prefix={folder}/",
    ]
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), target, *options, str(folder / "inputs")],
        cwd=HERE,
        env=oracle.environment(TMPDIR=str(folder)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 120,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    runs = re.search(r"Done (\d+) runs", output)
    assert runs, output[-3000:]
    count(f"guided by coverage: {target}", int(runs[1]), int(runs[1]))


def test_a_file_in_parts_is_read_as_the_whole_of_it() -> None:
    @given(
        st.lists(st.binary(max_size=20), max_size=6),
        st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=20),
    )
    @example([b"", b"ab", b""], [(False, 2), (False, 1)])
    def check(parts: list[bytes], reads: list[tuple[bool, int]]) -> None:
        scattered, whole = _pickled._Scattered(list(parts)), io.BytesIO(b"".join(parts))
        for into, n in reads:
            if into:
                one, other = bytearray(n), bytearray(n)
                assert scattered.readinto(memoryview(one)) == whole.readinto(other)
                assert one == other
            else:
                assert bytes(scattered.read(n)) == whole.read(n)

    check()


errors = [ValueError(), RecursionError(), MemoryError(), AttributeError("gone"), ImportError(), EOFError(), UnicodeError()]


@pytest.mark.parametrize("outcome", [*errors, KeyError(), OSError(5), [], {}, {1}], ids=repr)
def test_whatever_comes_of_unpickling_a_key_it_is_a_documented_error(outcome: Any) -> None:
    def loads(typed: bytes) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with (
        mock.patch("pickle.loads", loads),
        pytest.raises((CorruptError, LoadError, MemoryError)),
    ):
        _keys.decode(b"h" + bytes(32), b"a pickle")


# --- the targets must see what is wrong


class _Passes(int):
    """A checksum that is always right."""

    def __ne__(self, other: object) -> bool:
        return False


class _Hasher:
    def update(self, data: Any) -> None:
        pass

    def intdigest(self) -> int:
        return _Passes()


UNCHECKED: dict[str, Callable[[], Any]] = {
    "value_file, its stream": lambda: mock.patch.object(_valuefile, "xxh3_64", _Hasher),
    "value_file, its buffers and footer": lambda: mock.patch.object(_valuefile, "xxh3_64_intdigest", return_value=_Passes()),
    "record": lambda: mock.patch.object(_lmdb, "_digest", return_value=_Passes()),
    "envelope": lambda: mock.patch.object(hmac, "compare_digest", return_value=True),
}


@pytest.mark.parametrize("target", UNCHECKED)
def test_a_check_that_is_left_out_is_missed(target: str) -> None:
    n = 0
    with fuzz.aimed_at(target.partition(",")[0]) as aimed, UNCHECKED[target]():

        @settings(LOOK, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
        @given(damages[target.partition(",")[0]])
        def attempt(data: bytes) -> None:
            nonlocal n
            n += 1
            aimed(data)

        with pytest.raises((AssertionError, struct.error, ValueError, IndexError)):
            attempt()
    count(f"fuzzing without a check: {target}", n, n - 1, control=True)
