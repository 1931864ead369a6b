"""Names of keys: the same exactly where a dict finds one key, whatever the types; and file names that never meet."""

from __future__ import annotations

import enum
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import time as clock
from collections import namedtuple
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chest._keys import OPAQUE_PREFIX, decode, encode, key_to_filename, name_of, opaque_name, pickled_key
from chest.errors import ChestError, CorruptError, KeyTypeError, LoadError

BERLIN = ZoneInfo("Europe/Berlin")
NEW_YORK = ZoneInfo("America/New_York")

Point = namedtuple("Point", "x y")


class Number(enum.IntEnum):
    ONE = 1


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Letter(str, enum.Enum):
    A = "a"


class Colour(enum.Enum):
    RED = 1
    GREEN = 2
    ROT = 1  # noqa: PIE796 - an alias is the same member


class Fruit(enum.Enum):
    RED = 1


class Access(enum.Flag):
    R = 1
    W = 2


class Text(str):
    pass


class Whole(int):
    def __str__(self):
        return "nonsense"

    __repr__ = __str__

    def __lt__(self, other):
        return False

    __gt__ = __lt__


class Row(tuple):
    def __iter__(self):
        return iter("nonsense")

    def __len__(self):
        return 77


class Bag(frozenset):
    def __iter__(self):
        return iter("nonsense")

    def __reduce__(self):
        return Bag, (list(frozenset.__iter__(self)),)


class Exact(Decimal):
    pass


class Shout(str):
    """A class whose equality is its own."""

    def __eq__(self, other):
        return str(self).upper() == str(other).upper()

    def __hash__(self):
        return hash(str(self).upper())


class OwnEquality(str):
    def __eq__(self, other):
        return self is other

    __hash__ = str.__hash__


class OwnHash(int):
    def __hash__(self):
        return 7


class Plain:
    pass


def one_of(*items):
    """As ``st.sampled_from``, with a short repr."""
    return st.integers(0, len(items) - 1).map(lambda n: items[n])


# --- strategies -------------------------------------------------------------------------------------------------------

small = st.integers(-3, 3)
text = st.text(st.characters(), max_size=4) | st.text("aA\0_/\ud800", max_size=3)
zones = st.sampled_from(
    [None, timezone.utc, timezone(timedelta(hours=2)), timezone(timedelta(hours=-5, minutes=-30)), BERLIN, NEW_YORK]
)
# Few values, so that pairs often are the same instant or clock.
moments = st.builds(
    datetime,
    st.just(2024),
    st.sampled_from([1, 3, 10, 11]),
    st.sampled_from([3, 10, 27, 31]).filter(lambda d: d < 30),
    st.integers(0, 9),
    st.sampled_from([0, 30]),
    fold=st.sampled_from([0, 1]),
    tzinfo=zones,
)
numbers = st.one_of(
    small,
    st.booleans(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 0.1, 1e300, -1e300, math.inf, -math.inf, math.nan, 5e-324, 2.0**63, -(2.0**63)]),
    st.integers(),
    one_of(2**63 - 1, 2**63, -(2**63), 1 - 2**63, 2**64, 10**300, int(1e300), 10**4000),
    st.floats(),
    st.decimals(allow_nan=False),
    st.sampled_from(
        [Decimal("1.00"), Decimal("0.1"), Decimal.from_float(0.1), Decimal("-0"), Decimal("1e4000"), Decimal("inf")]
    ),
    st.fractions(),
    st.builds(Fraction, small, st.sampled_from([1, 2, 3, 4, 10])),
    st.builds(complex, small, small),
    st.complex_numbers(),
)
leaves = st.one_of(
    numbers,
    text,
    st.binary(max_size=3),
    st.none(),
    st.just(...),
    st.dates() | st.just(date(2024, 1, 3)),
    moments,
    st.datetimes(timezones=zones),
    st.times(timezones=st.sampled_from([None, timezone.utc, timezone(timedelta(hours=2)), BERLIN])),
    st.builds(time, st.integers(0, 3), tzinfo=st.sampled_from([None, timezone.utc, timezone(timedelta(hours=1))])),
    st.timedeltas() | st.builds(timedelta, seconds=small),
    st.builds(UUID, int=st.integers(0, 3)),
    st.builds(range, small, small, small.filter(bool)),
    st.builds(PurePosixPath, text.filter(lambda s: "\0" not in s)),
    st.builds(PureWindowsPath, text.filter(lambda s: "\0" not in s)),
    st.sampled_from([*Number, *Bits, Bits.A | Bits.B, *Letter, *Colour, *Fruit, Access.R, Access.R | Access.W]),
    st.builds(Text, text) | st.builds(Whole, small) | st.builds(Shout, text),
    st.sampled_from([Plain, Plain(), len, Point(1, "a"), memoryview(b"a")]),
    st.text(min_size=500, max_size=600) | one_of("x" * 510, "x" * 511, b"x" * 511, ("x" * 600,)),
)
keys = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3).map(frozenset) | st.builds(Point, inner, inner)
    ),
    max_leaves=5,
)
plain = st.recursive(st.integers() | text | st.binary(max_size=4), lambda inner: st.lists(inner, max_size=4).map(tuple))


def one_key(a, b):
    """What a dict thinks, NaN aside."""
    return hash(a) == hash(b) and bool(a == b)


def same(a, b):
    """Equal in type and value, all the way down."""
    if type(a) is not type(b) or a != b:
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, tuple.__iter__(a), tuple.__iter__(b)))
    if isinstance(a, frozenset):
        return {(type(m), m) for m in frozenset.__iter__(a)} == {(type(m), m) for m in frozenset.__iter__(b)}
    if isinstance(a, (datetime, time)) and a.fold != b.fold:
        return False
    return repr(a) == repr(b)


# --- one key, one name ------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(keys, keys)
def test_two_keys_have_one_name_exactly_when_a_dict_takes_them_for_one_key(a, b):
    first, second = name_of(a), name_of(b)
    if first is not None and second is not None:
        assert one_key(a, b) == (first == second)


@settings(max_examples=100)
@given(st.lists(leaves, min_size=30, max_size=30))
def test_within_many_keys_no_pair_is_told_apart_or_confused(many):
    named = [(key, name_of(key)) for key in many]
    for (a, first), (b, second) in itertools.combinations([pair for pair in named if pair[1] is not None], 2):
        assert one_key(a, b) == (first == second), (a, b)


@settings(max_examples=400)
@given(keys)
def test_a_key_comes_back_with_its_type_and_value(key):
    try:
        encoded = encode(key)
    except KeyTypeError:
        return  # a memoryview
    if encoded is None:
        return
    name, typed = encoded
    assert name == name_of(key)
    assert 1 <= len(name) <= 511
    assert name[:1] != OPAQUE_PREFIX
    assert same(decode(name, typed), key)


@given(plain)
def test_plain_keys_need_nothing_beside_their_name(key):
    name, typed = encode(key)
    assert bool(typed) == (name[:1] == b"h")


@pytest.mark.parametrize(
    "family",
    [
        [
            1,
            1.0,
            True,
            Decimal(1),
            Decimal("1.00"),
            Fraction(1),
            complex(1, 0),
            Number.ONE,
            Bits.A,
            Whole(1),
            Exact("1.0"),
        ],
        [0, 0.0, -0.0, False, Decimal("-0"), Decimal("0e999999"), Fraction(0), complex(-0.0, -0.0)],
        [0.5, Decimal("0.50"), Fraction(1, 2), complex(0.5, 0.0)],
        [0.1, Decimal.from_float(0.1), Fraction(0.1)],
        [Decimal("0.1"), Fraction(1, 10)],
        [2**63, 2.0**63, Decimal(2**63)],
        [10**4000, Decimal("1e4000"), Fraction(10**4000)],
        [Fraction(1, 10**4000), Decimal("1e-4000")],
        [math.inf, Decimal("inf"), complex(math.inf, 0)],
        [complex(0.0, 1.0), complex(-0.0, 1.0)],
        ["a", Letter.A, Text("a")],
        [b"a", memoryview(b"a")],
        [(1, "a"), (1.0, "a"), (True, Letter.A), Point(1, "a"), Row((1, "a"))],
        [((1,),), ((1.0,),), (Row((1,)),)],
        [frozenset({1, "a"}), frozenset({Letter.A, 1.0}), Bag({1, "a"})],
        [clock.gmtime(0), tuple(clock.gmtime(0))],
        [range(0), range(5, 5), range(3, 1)],
        [range(1, 2), range(1, 9, 100)],
        [range(0, 4, 2), range(0, 3, 2)],
        [datetime(2024, 1, 3, fold=1), datetime(2024, 1, 3)],
        [
            datetime(2024, 1, 3, 12, tzinfo=timezone.utc),
            datetime(2024, 1, 3, 13, tzinfo=BERLIN),
            datetime(2024, 1, 3, 7, tzinfo=NEW_YORK),
            datetime(2024, 1, 3, 14, tzinfo=timezone(timedelta(hours=2))),
        ],
        [time(1, fold=1), time(1), time(1, tzinfo=BERLIN)],
        [time(12, tzinfo=timezone.utc), time(13, tzinfo=timezone(timedelta(hours=1)))],
        [UUID(int=1), UUID(int=1, is_safe=SafeUUID.safe)],
        [PureWindowsPath("C:/X"), PureWindowsPath("c:\\x")],
        [PurePosixPath("a//b"), PurePosixPath("./a/b")] + [Path("a/b")] * (os.name != "nt"),
        [Colour.RED, Colour.ROT],
    ],
    ids=lambda family: repr(family[0])[:30] if not isinstance(family[0], frozenset) else "frozenset",
)
def test_equal_keys_of_different_types_have_one_name(family):
    assert len(set(family)) == 1
    names = {name_of(key) for key in family}
    assert len(names) == 1
    assert None not in names
    for key in family:
        if not isinstance(key, memoryview):
            assert same(decode(*encode(key)), key)


def test_keys_that_look_alike_have_different_names():
    alike = [
        *(1, "1", b"1", ("1",), (1,), ((1,),), frozenset({1}), "i1", b"i1", "(1,)", Decimal("1.1"), 1.1, complex(1, 1)),
        *(
            "",
            b"",
            (),
            frozenset(),
            None,
            "None",
            ...,
            "\0",
            ("",),
            ("", ""),
            ("\0",),
            ("\0", ""),
            ("", "\0"),
            ((),),
            ((), ()),
        ),
        *(
            ("a", "b"),
            ("as", "b"),
            ("a\0sb",),
            ("a", ("b",)),
            (("a",), "b"),
            "\ud800",
            "\udc00",
            ("\ud800",),
            "\U00010000",
        ),
        *(
            date(2024, 1, 1),
            datetime(2024, 1, 1),
            datetime(2024, 1, 1, tzinfo=timezone.utc),
            time(),
            timedelta(),
            "0:00:00",
        ),
        *(time(tzinfo=timezone.utc), UUID(int=1), str(UUID(int=1)), range(0), range(1), range(2), (0, 1)),
        *(PurePosixPath("a"), PureWindowsPath("a"), "a", PurePosixPath("A"), PurePosixPath("/a"), PurePosixPath("//a")),
        *(Colour.RED, Colour.GREEN, Fruit.RED, Access.R, Access.W, Access.R | Access.W, Access(0)),
        *(Fraction(2**60 + 1, 2), Fraction(2**60 + 3, 2), 2.0**59, Fraction(1, 3), 1 / 3, Fraction(1, 2**1080)),
        *(10**4000, 10**4000 + 1, -(10**4000), "x" * 511, "x" * 512, b"x" * 511, math.inf, -math.inf),
    ]
    assert len(set(alike)) == len(alike)
    assert len({name_of(key) for key in alike}) == len(alike)


def test_what_a_uuid_knows_of_its_origin_comes_back():
    assert decode(*encode(UUID(int=1, is_safe=SafeUUID.safe))).is_safe is SafeUUID.safe


# --- opaque keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *(math.nan, Decimal("nan"), complex(math.nan, 0), complex(0, math.nan), (1, math.nan), frozenset({math.nan})),
        *(
            Plain,
            Plain(),
            len,
            Shout("a"),
            OwnEquality("a"),
            OwnHash(1),
            (OwnHash(1), "a"),
            timezone.utc,
            memoryview(b"a").cast("b"),
        ),
        *(10**20000, Decimal("1e20000"), Decimal("1e1000000"), Decimal("1e-1000000"), Fraction(1, 10**20000)),
        datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
        datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
        datetime(2024, 3, 31, 2, 30, tzinfo=BERLIN),
        time(1, tzinfo=timezone(timedelta(microseconds=1))),
        PureWindowsPath("a\u03a3"),
    ],
    ids=lambda key: str(key)[:30].partition(" at 0x")[0] if not isinstance(key, (int, Fraction)) else "large",
)
def test_a_key_whose_equality_only_its_class_knows_has_no_name(key):
    assert name_of(key) is None
    assert encode(key) is None


def test_opaque_names_differ_and_their_keys_come_back_from_the_pickle():
    names = {opaque_name() for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(OPAQUE_PREFIX) and len(name) == 17 for name in names)
    key = decode(opaque_name(), pickled_key(Shout("a")))
    assert type(key) is Shout
    assert key == Shout("A")


def test_classes_made_inside_a_function_are_opaque_and_cannot_be_written():
    class Inner(enum.Enum):
        A = 1

    assert name_of(Inner.A) is None
    with pytest.raises(KeyTypeError, match=r"Inner.A.*cannot be pickled") as caught:
        pickled_key(Inner.A)
    assert caught.value.key is Inner.A


def test_a_class_that_was_defined_again_does_not_share_names_with_the_old_one(monkeypatch):
    old = Colour.RED
    named = name_of(old)
    new = enum.Enum("Colour", {"RED": 1}, module=__name__)
    monkeypatch.setitem(globals(), "Colour", new)
    assert name_of(old) is None
    assert name_of(new.RED) == named


def test_the_limit_for_large_numbers_is_one_of_value():
    for exponent in (9000, 9863, 9864, 9865, 9999, 10000, 10001, 20000):
        one = name_of(10**exponent)
        zeros = Decimal((0, (1, *[0] * 30_000), exponent - 30_000))
        assert one == name_of(Decimal(f"1e{exponent}")) == name_of(zeros) == name_of(Fraction(10**exponent))
        small = name_of(Fraction(1, 10**exponent))
        assert small == name_of(Decimal(f"1e-{exponent}")) == name_of(Decimal((0, (1, *[0] * 30_000), -exponent - 30_000)))
        assert name_of(Fraction(5, 10**exponent)) == name_of(Decimal(f"5e-{exponent}"))
    assert name_of(10**9000) is not None
    five = Decimal((0, Decimal(5**20_000).as_tuple().digits, -20_000))
    assert name_of(five) == name_of(Fraction(1, 2**20_000)) is not None
    assert name_of(Decimal((0, (1,) + (0,) * 100_000, -100_000))) == name_of(1)
    assert name_of(Decimal((0, (2,) + (0,) * 100_000, 10**6))) is None


def test_two_clocks_of_one_zone_that_read_the_same_instant_do_not_share_a_name():
    class Naive(tzinfo):
        """Leaps from +1 to +2 hours at 2:00 on 31 March and does not know that 2:30 is no time."""

        def utcoffset(self, moment):
            return timedelta(hours=1 if moment.replace(tzinfo=None) < datetime(2024, 3, 31, 3) else 2)

        def dst(self, moment):
            return self.utcoffset(moment) - timedelta(hours=1)

    zone = Naive()
    no_time, half_past_three = (datetime(2024, 3, 31, hour, 30, tzinfo=zone) for hour in (2, 3))
    assert no_time != half_past_three
    assert hash(no_time) == hash(half_past_three)
    assert (name_of(no_time) is None) != (name_of(half_past_three) is None)
    assert name_of(datetime(2024, 5, 31, 2, 30, tzinfo=zone)) == name_of(datetime(2024, 5, 31, 0, 30, tzinfo=timezone.utc))
    assert name_of(datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5)))) is not None
    assert name_of(datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))) is not None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [[], {}, set(), ([],), (1, ({},)), (math.nan, []), Decimal("snan"), (Plain(), set())])
@pytest.mark.parametrize("call", [name_of, encode, key_to_filename])
def test_unhashable_keys_raise_what_dict_raises(call, key):
    with pytest.raises(TypeError) as expected:
        hash(key)
    with pytest.raises(TypeError) as caught:
        call(key)
    assert not isinstance(caught.value, ChestError)
    assert str(caught.value) == str(expected.value)


def test_a_memoryview_that_can_be_written_to_is_refused_as_by_dict():
    with pytest.raises(ValueError, match="writable"):
        name_of(memoryview(bytearray(b"a")))


def nested(depth, inner=()):
    for _ in range(depth):
        inner = (inner,)
    return inner


def test_nesting_too_deep_is_refused_at_a_fixed_depth_and_crashes_nothing():
    assert same(decode(*encode(nested(99))), nested(99))
    abyss = nested(500_000)  # its very hash would overflow the stack
    for call in (name_of, encode, key_to_filename):
        for key in (nested(100), abyss, (math.nan, abyss), frozenset({nested(100)})):
            with pytest.raises(KeyTypeError, match="nested"):
                call(key)


def test_a_key_that_cannot_be_pickled_is_refused_with_the_reason():
    with pytest.raises(KeyTypeError, match=r"of type function cannot be written.*cannot be pickled.*Use") as caught:
        pickled_key(lambda: 1)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is not None
    with pytest.raises(KeyTypeError, match="memoryview"):
        encode(memoryview(b"a"))


# --- decoding ---------------------------------------------------------------------------------------------------------

tags = st.sampled_from([bytes((n,)) for n in b"sbiIfqctpzNEdDATVLurReghox/\\"])


@settings(max_examples=500)
@given(tags | st.just(b""), st.binary(max_size=40), st.just(b"") | st.binary(max_size=12))
def test_decoding_nonsense_raises_nothing_but_its_errors(tag, rest, typed):
    try:
        key = decode(tag + rest, typed)
    except LoadError:  # and CorruptError, its subclass
        return
    if not typed:
        assert name_of(key) == tag + rest
    hash(key)


@settings(max_examples=200)
@given(keys, st.integers(0, 600), st.integers(1, 255))
def test_a_damaged_name_never_gives_a_key_that_has_another_name(key, place, flip):
    name = name_of(key)
    if name is None:
        return
    damaged = bytearray(name)
    damaged[place % len(name)] ^= flip
    with suppress(CorruptError):
        assert name_of(decode(bytes(damaged), b"")) == damaged


@pytest.mark.parametrize("name", [b"", b"i01", b"i 1", b"i+1", b"i1_0", b"I+\1", b"p", b"psa", b"t\2sa", b"f" + b"\0" * 8])
def test_forms_that_encode_does_not_write_are_damage(name):
    if name == b"p":
        assert decode(name, b"") == ()
        return
    with pytest.raises(CorruptError):
        decode(name, b"")


def test_a_deeply_nested_name_is_damage():
    form = b"N"
    for _ in range(5000):
        form = b"t" + (bytes((len(form),)) if len(form) < 255 else b"\xff" + len(form).to_bytes(8, "big")) + form
    with pytest.raises(CorruptError):
        decode(form, b"")


def test_a_key_whose_class_has_gone_is_a_load_error_and_not_damage(monkeypatch):
    name, typed = encode(Colour.RED)
    monkeypatch.delitem(globals(), "Colour")
    with pytest.raises(LoadError, match="importable") as caught:
        decode(name, typed)
    assert not isinstance(caught.value, CorruptError)
    with pytest.raises(LoadError):
        decode(opaque_name(), b"cno_such_module_at_all\nThing\n.")


def test_a_pickle_cut_short_or_of_something_unhashable_is_damage():
    name, typed = encode(Point(1, "a"))
    with pytest.raises(CorruptError):
        decode(name, typed[:-3])
    with pytest.raises(CorruptError, match="not hashable"):
        decode(name, pickle.dumps([1]))


def test_names_do_not_depend_on_the_hash_seed():
    code = (
        "from chest._keys import name_of, key_to_filename\n"
        "key = (frozenset('abcdefgh'), frozenset([1, 'x', frozenset('yz')]))\n"
        "print(name_of(key).hex(), key_to_filename(key))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(answers) == 1


def test_names_are_what_earlier_versions_wrote():
    assert name_of("a\ud800") == b"sa\xed\xa0\x80"
    assert name_of(-5) == b"i-5"
    assert name_of(2**64) == b"I+\1" + bytes(8)
    assert name_of(0.5) == b"f\x3f\xe0" + bytes(6)
    assert name_of(("a", 1.0)) == b"psa\0i1\0"
    assert name_of(("a", (1,))) == b"t\2sa\4pi1\0"
    assert name_of(frozenset({None, b"a"})) == b"z\1N\2ba"
    assert name_of(Fraction(1, 3)) == b"q\2i1\2i3"
    assert name_of(date(2024, 1, 1)) == b"d\0\x0bFF"
    assert name_of(datetime(1, 1, 1, 0, 0, 1)) == b"D" + (10**6).to_bytes(8, "big")
    assert name_of(PureWindowsPath("A/b")) == b"\\a\\b"
    assert name_of(Colour.RED) == f"e{__name__}\0Colour\0sRED".encode()
    assert name_of(Access.R | Access.W) == f"g{__name__}\0Access\0i3".encode()
    assert name_of("x" * 511)[:5].hex() == "6876ac50aa"
    assert key_to_filename(1) == "068c6aebaa3afe5a00d174ec86a509be3"


# --- NumPy and pandas -------------------------------------------------------------------------------------------------


def test_numpy_scalars_are_the_numbers_and_texts_that_they_equal():
    np = pytest.importorskip("numpy")
    families = [
        [1, np.int64(1), np.uint8(1), np.float16(1), np.float64(1), np.complex64(1), np.True_, np.longdouble(1)],
        [0.5, np.float32(0.5), np.float64(0.5), np.complex128(0.5), np.longdouble(0.5), np.clongdouble(0.5)],
        [0, np.float64(-0.0), np.False_],
        [2**64 - 1, np.uint64(2**64 - 1)],
        [1 + 2j, np.complex64(1 + 2j), np.clongdouble(1 + 2j)],
        ["a\0", np.str_("a\0")],
        [b"a\0", np.bytes_(b"a\0")],
        [(1, "a"), (np.int8(1), np.str_("a"))],
    ]
    for family in families:
        assert len({name_of(key) for key in family}) == 1
        for key in family:
            if key not in ("a\0", b"a\0"):
                assert same(decode(*encode(key)), key)
    assert name_of(np.float32(0.1)) == name_of(float(np.float32(0.1))) != name_of(0.1)


def test_a_key_whose_pickle_gives_another_key_is_refused():
    np = pytest.importorskip("numpy")
    with pytest.raises(KeyTypeError, match="does not give it back"):
        encode(np.str_("a\0"))  # NumPy drops the NUL


def test_numpy_scalars_that_equal_nothing_builtin_are_opaque():
    np = pytest.importorskip("numpy")
    for key in [np.float64("nan"), np.float32("nan"), np.datetime64("2024-01-01"), np.datetime64("nat", "s")]:
        assert name_of(key) is None
    for key in [np.timedelta64(1, "ns"), np.timedelta64("nat", "s"), np.timedelta64(1, "Y")]:
        assert name_of(key) is None
    if np.finfo(np.longdouble).nmant > 52:
        assert name_of(np.longdouble(1) / np.longdouble(3)) is None
    for array in (np.zeros(1), np.void(b"a")):
        try:
            hash(array)
        except TypeError:
            with pytest.raises(TypeError):
                name_of(array)
        else:
            assert name_of(array) is None


def test_numpy_time_spans_have_the_name_of_a_timedelta_exactly_where_they_are_one_key():
    np = pytest.importorskip("numpy")
    for key, value in [
        (np.timedelta64(1, "s"), timedelta(seconds=1)),
        (np.timedelta64(2000, "ns"), timedelta(0, 0, 2)),
    ]:
        assert name_of(key) == (name_of(value) if one_key(key, value) else None)


def test_pandas_timestamps_are_opaque():
    pd = pytest.importorskip("pandas")
    assert name_of(pd.Timestamp("2024-01-01")) is None
    assert name_of(pd.Timedelta("1s")) is None
    assert name_of(pd.NaT) is None


# --- file names -------------------------------------------------------------------------------------------------------

words = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,3}", fullmatch=True)
file_keys = (
    keys
    | words
    | st.lists(words | st.integers(0, 3), max_size=4).map(tuple)
    | st.sampled_from(["_a", "a", "A", "0a", "con", "CON", "Aux", ("a", "b"), "_a/b", ("_a", "b"), "", ".", "..", ".keys"])
)
HEX = re.compile("0[0-9a-f]{32}")
PART = re.compile("[A-Za-z0][A-Za-z0-9_]*")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("x", "x"),
        ("some_Word9", "some_Word9"),
        ("x" * 200, "x" * 200),
        (Letter.A, "a"),
        (("a", "b"), "_a/b"),
        (("a", "b", "c"), "_a/_b/c"),
        (Row(("a", "b")), "_a/b"),
        (tuple("abcdefghijklmnop"), "_a/_b/_c/_d/_e/_f/_g/_h/_i/_j/_k/_l/_m/_n/_o/p"),
        (("x" * 200,) * 4, "/".join(["_" + "x" * 200] * 3 + ["x" * 200])),
    ],
)
def test_plain_words_and_tuples_of_them_show_in_the_file_name(key, path):
    assert key_to_filename(key) == path


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            ".",
            "..",
            "/",
            "a/b",
            "a b",
            "_a",
            "9a",
            "a.b",
            "é",
            "\uff41",
            "a\n",
            "\0",
            "con",
            "NUL",
            "Com1",
            "lpt9",
            "x" * 201,
        ),
        *(1, b"a", None, (), ("a",), tuple("abcdefghijklmnopq"), ("x" * 200,) * 5, frozenset("a"), 0.5, "x" * 600),
    ],
)
def test_everything_else_is_a_digest(key):
    assert HEX.fullmatch(key_to_filename(key))


def test_members_that_are_no_words_are_digests_in_their_folder():
    assert key_to_filename(("a", 1)) == "_a/" + key_to_filename(1)
    assert key_to_filename((1, "a")) == "_" + key_to_filename(1) + "/a"
    assert re.fullmatch("_a/0[0-9a-f]{32}", key_to_filename(("a", ("b", "c"))))
    assert re.fullmatch("_0[0-9a-f]{32}/b", key_to_filename(("con", "b")))


def test_upper_case_words_are_digests_where_the_file_system_folds_case():
    assert key_to_filename("x", folds=True) == "x"
    assert HEX.fullmatch(key_to_filename("X", folds=True))
    assert key_to_filename(("a", "B"), folds=True) == "_a/" + key_to_filename("B", folds=True)


@settings(max_examples=200)
@given(st.lists(file_keys, min_size=2, max_size=12), st.booleans())
def test_different_keys_never_meet_on_disk(many, folds):
    paths = {}
    for key in many:
        name = name_of(key)
        if name is not None:
            path = key_to_filename(key, folds=folds)
            assert path == key_to_filename(key, name, folds=folds)
            assert paths.setdefault(name, path) == path  # equal keys have one path
    on_disk = [path.casefold() if folds else path for path in paths.values()]
    assert len(set(on_disk)) == len(on_disk)
    for path in on_disk:
        assert len(path) <= 1000
        *folders, last = path.split("/")
        assert PART.fullmatch(last)
        assert all(folder[0] == "_" and PART.fullmatch(folder[1:]) for folder in folders)
        assert not any(other.startswith(path + "/") for other in on_disk)


def test_opaque_keys_are_filed_under_the_name_they_were_given():
    key, name = (Plain(), "a"), opaque_name()
    assert HEX.fullmatch(key_to_filename(key, name))
    assert key_to_filename(key, name) == key_to_filename(key, name) != key_to_filename(key, opaque_name())
    assert key_to_filename(Plain) == key_to_filename(Plain)
    with pytest.raises(KeyTypeError):
        key_to_filename(lambda: 1)
