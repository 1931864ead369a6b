"""What an object of a given type holds: the bytes of its own, and its members. ``_sizing`` adds them up.

A *plan* is found once for each type and answers for one object, in about a microsecond and without running code of the
user's where there is another way. Nothing is imported to recognise arrays and frames: their types are found by name.

The attributes of an object are asked of the garbage collector. It knows ``__dict__``, slots and the fields of C types
alike, and does not make a ``__dict__`` for an object that had none, as reading ``__dict__`` does.

What makes objects on the fly (the buffers of an arrow table) must identify them by something else than ``id``: the next
one made may have the same.
"""

from __future__ import annotations

import gc
import operator
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice, repeat
from sys import getsizeof
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, cast

__all__ = ["ALL", "GOLDEN", "HEADER", "array_kinds", "flat", "leaves", "own_bytes", "parts", "quick", "register"]

Groups = Sequence[tuple[Sequence[Any], int]]  # (the members or a sample of them, how many there are)
Parts = tuple[object, int, Groups]  # (what identifies the object's own bytes, their number, its members)
Plan = Callable[[Any], Parts]
Size = Callable[[Any], int]

ALL = 1024  # members up to here are all handed out, beyond that a sample
GOLDEN = tuple(i * 0.6180339887498949 % 1 for i in range(128))  # the first k of these, for any k, are evenly spread over [0, 1)
HEADER = 112  # an array object beside its buffer
_MANY_CHUNKS = 64

# CPython's means; with None the attributes are read by name.
_referents: Callable[..., list[Any]] | None = getattr(gc, "get_referents", None)

_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented)})
_GLOBAL = frozenset({type, FunctionType, BuiltinFunctionType, ModuleType, CodeType})
# Their nbytes is not what they hold: object columns would count as pointers, lazy arrays as if they were loaded.
_LOOK_INSIDE = frozenset({"pandas", "dask", "zarr", "h5py"})

leaves: set[type] = set(_SCALARS)  # types whose objects refer to nothing; getsizeof never fails and runs no Python code
flat: set[type] = set()  # types whose plan is cheap and whose objects may be huge
array_kinds: set[type] = set()
quick: dict[type, Size] = {}  # measures of whole values that need no walk; -1 where they cannot tell
_plans: dict[type, Plan] = {}
_registered: dict[type, Size] = {}
_registered_names: dict[str, Size] = {}
_quick_builtins: dict[type, Size] = {}


# --- From a type to its plan ------------------------------------------------------------------------------------------


def parts(value: Any) -> Parts:
    """What ``value`` holds; never raises but ``RecursionError``."""
    kind = type(value)
    try:
        return (_plans.get(kind) or _new_plan(kind))(value)
    except RecursionError:
        raise
    except Exception:  # it changes under our hands, or is broken
        return id(value), own_bytes(value), ()


def own_bytes(value: object) -> int:
    """``sys.getsizeof`` that never raises."""
    try:
        return getsizeof(value)
    except Exception:
        return type(value).__basicsize__


def register(kind: type | str, size: Size) -> None:
    """``size`` measures the type and its subclasses from now on."""
    if isinstance(kind, str):
        _registered_names[kind] = size
    else:
        _registered[kind] = size
    _forget_types()


def offer_quick(quick_builtins: dict[type, Size]) -> None:
    """Short ways for exact builtin types, taken unless such a type is registered."""
    _quick_builtins.update(quick_builtins)
    _forget_types()


def _forget_types() -> None:
    leaves.intersection_update(_SCALARS)
    leaves.update(_SCALARS)
    leaves.difference_update([kind for kind in _SCALARS if _custom(kind)])
    flat.clear()
    array_kinds.clear()
    quick.clear()
    quick.update({kind: size for kind, size in _quick_builtins.items() if not _custom(kind)})
    _plans.clear()


def _find(kind: type, types: dict[type, Any], names: dict[str, Any]) -> Any:
    for base in kind.__mro__:
        if base in types:
            return types[base]
        own = f"{base.__module__}.{base.__qualname__}"
        for name, found in names.items():
            module, _, attribute = name.rpartition(".")
            # Also by the name it is exported under ('pandas.DataFrame'), read so that no lazy import is triggered.
            if name == own or getattr(sys.modules.get(module), "__dict__", {}).get(attribute) is base:
                return found
    return None


def _custom(kind: type) -> Size | None:
    return cast("Size | None", _find(kind, _registered, _registered_names))


def _new_plan(kind: type) -> Plan:
    if len(_plans) > 4096:  # classes made on the fly must not be kept alive for ever
        _forget_types()
    custom, default = _custom(kind), _default_plan(kind)
    if custom is None:
        if default is _leaf and not _collected(kind):
            leaves.add(kind)
        if default in _FLAT:
            flat.add(kind)
        if _find(kind, {}, {"numpy.ndarray": True}):
            array_kinds.add(kind)
            if default is _array:
                quick[kind] = _quick_array
        _plans[kind] = default
        return default

    def registered(value: Any) -> Parts:
        try:
            size = operator.index(custom(value))
        except Exception:
            size = -1
        return (id(value), size, ()) if size >= 0 else default(value)

    _plans[kind] = registered
    return registered


def _default_plan(kind: type) -> Plan:
    if issubclass(kind, type):
        return _nothing
    if kind in _EXACT:
        return _EXACT[kind]
    plan: Plan | None = _find(kind, _TYPES, {})
    if plan is not None:
        return _with_attributes(plan) if kind not in _TYPES and _has_attributes(kind) else plan
    plan = _find(kind, {}, _NAMES)
    if plan is not None:
        return _with_attributes(plan) if plan is _array and _has_attributes(kind) else plan
    if not _LOOK_INSIDE.isdisjoint(base.__module__.partition(".")[0] for base in kind.__mro__):
        return _inside
    namespaces = [vars(base) for base in kind.__mro__]
    if any("nbytes" in namespace for namespace in namespaces):
        return _by_its_word
    if not _collected(kind):
        return _leaf
    # An instance may have nbytes where its class has not; asking runs no code unless the class hooks attribute access.
    return _object if any("__getattr__" in namespace for namespace in namespaces) else _by_its_word


def _collected(kind: type) -> bool:
    return bool(kind.__flags__ & 1 << 14)  # the others are unknown to the garbage collector: they refer to nothing


def _has_attributes(kind: type) -> bool:
    return bool(kind.__dictoffset__) or any(vars(base).get("__slots__") for base in kind.__mro__)


# --- Containers -------------------------------------------------------------------------------------------------------
# Always the methods of the builtin base, never those of a subclass: they may do anything.


def spread(n: int) -> list[int]:
    """Where to look in a sequence of more than ``ALL``: evenly, at pairs of neighbours, so that runs show."""
    return [i for f in GOLDEN[:64] for i in (int(f * n), min(int(f * n) + 1, n - 1))]


def _sequence(base: Any) -> Plan:
    def plan(value: Any) -> Parts:
        n = base.__len__(value)
        members = list(base.__iter__(value) if n <= ALL else map(base.__getitem__, repeat(value), spread(n)))
        return id(value), own_bytes(value), ((members, n),)

    return plan


def _exact_sequence(value: Any) -> Parts:
    n = len(value)
    return id(value), getsizeof(value), ((value if n <= ALL else [value[i] for i in spread(n)], n),)


def _pick(n: int, forward: Iterable[Any], backward: Iterable[Any] | None) -> tuple[Sequence[Any], int]:
    if n <= ALL:
        return list(forward), n
    if n <= 16 * ALL:
        return list(islice(forward, 0, None, n // 128 | 1)), n  # odd, so that of alternating members both are met
    if backward is None:
        return list(islice(forward, 128)), n
    return [*islice(forward, 64), *islice(backward, 64)], n  # the middle cannot be reached without passing the rest


def _mapping(value: Any) -> Parts:
    n = dict.__len__(value)
    if n <= ALL // 2:
        return id(value), own_bytes(value), (([*dict.keys(value), *dict.values(value)], 2 * n),)
    values = dict.values(value)
    keys = _pick(n, dict.keys(value), dict.__reversed__(value))
    return id(value), own_bytes(value), (keys, _pick(n, values, reversed(values)))


def _exact_mapping(value: Any) -> Parts:
    n = len(value)
    if n > ALL // 2:
        return _mapping(value)
    return id(value), getsizeof(value), (([*value, *value.values()], 2 * n),) if n else ()


def _set(base: Any) -> Plan:
    return lambda value: (id(value), own_bytes(value), (_pick(base.__len__(value), base.__iter__(value), None),))


def _deque(value: Any) -> Parts:
    items = _pick(deque.__len__(value), deque.__iter__(value), deque.__reversed__(value))
    return id(value), own_bytes(value), (items,)


# --- Objects ----------------------------------------------------------------------------------------------------------


def _nothing(value: Any) -> Parts:
    return id(value), 0, ()  # classes, functions, modules: the program holds them, whatever the value does


def _leaf(value: Any) -> Parts:
    return id(value), own_bytes(value), ()


def _attributes(value: Any) -> list[Any]:
    """What the object refers to by ``__dict__`` and slots, without running code of its class."""
    found = []
    if type(value).__dictoffset__ and (attributes := object.__getattribute__(value, "__dict__")):
        found.append(attributes)
    for base in type(value).__mro__:
        if "__slots__" in vars(base):
            for slot in vars(base).values():
                if type(slot) is MemberDescriptorType:
                    try:
                        found.append(slot.__get__(value))
                    except AttributeError:
                        continue  # the slot is empty
    return found


def _with_attributes(plan: Plan) -> Plan:
    def both(value: Any) -> Parts:
        key, own, groups = plan(value)
        found = _attributes(value)
        return key, own, (*groups, (found, len(found))) if found else groups

    return both


def _object(value: Any) -> Parts:
    return _object_of(value, own_bytes(value))


def _inside(value: Any) -> Parts:
    return _object_of(value, object.__sizeof__(value) + 16)  # pandas' own __sizeof__ measures everything, slowly


def _object_of(value: Any, own: int) -> Parts:
    found = _attributes(value) if _referents is None else [m for m in _referents(value) if type(m) not in _GLOBAL]
    return id(value), own + 8 * len(found), ((found, len(found)),)  # 8: where attributes lie beside the object


def _by_its_word(value: Any) -> Parts:
    size: Any = None
    with suppress(Exception):
        size = getattr(value, "nbytes", None)
    if not hasattr(type(size), "__index__") or (size := operator.index(size)) < 0:  # absent, a method, nonsense
        return _object(value)
    own = own_bytes(value)
    return id(value), size + (own - size if own >= size else own), ()  # own may contain what nbytes tells


def _counted_by(size: Size, beside: int = 0) -> Plan:
    return lambda value: (id(value), int(size(value)) + beside, ())


# --- Arrays and frames ------------------------------------------------------------------------------------------------


def _owner(array: Any) -> Any:
    """The array whose buffer this one keeps alive; where the memory is no array's (a mapped file's), the last array."""
    ndarray = sys.modules["numpy"].ndarray
    owner, base = array, array.base
    while base is not None:
        if isinstance(base, ndarray):
            owner = base
        elif type(base).__name__ != "DummyArray":  # what as_strided puts in between
            break
        base = base.base
    return owner


def _array(value: Any) -> Parts:
    owner = value if value.base is None else _owner(value)
    return id(owner), owner.nbytes + HEADER, _array_members(owner) if owner.dtype.hasobject else ()


def _mapped_array(value: Any) -> Parts:
    return _array(value)  # its attributes name the file


def _array_members(array: Any) -> Groups:
    if array.dtype.names:
        fields = [array[name] for name in array.dtype.names if array.dtype[name].hasobject]
        return [group for field in fields for group in _array_members(field)]
    array = sys.modules["numpy"].asarray(array)
    n = array.size
    sample = array.reshape(-1) if n <= ALL else array.flat[spread(n)]
    return ((sample.tolist(), n),)


def _quick_array(value: Any) -> int:
    owner = value if value.base is None else _owner(value)
    return -1 if owner.dtype.hasobject else cast(int, owner.nbytes)


def _frame(value: Any) -> Parts:
    manager = value._mgr
    members = [*(block.values for block in manager.blocks), *manager.axes]
    if value._attrs:
        members.append(value._attrs)
    return id(value), 1000 + 500 * len(manager.blocks), ((members, len(members)),)


def _arrow_column(value: Any) -> Parts:
    if "_pa_array" not in vars(value):  # pandas 1 called it otherwise
        return _inside(value)
    cache = vars(value).get("_cache")
    members = [value._pa_array, cache] if cache else [value._pa_array]
    return id(value), 500, ((members, len(members)),)  # 500: its attributes, its data type, an empty cache


def _arrow(value: Any) -> Parts:
    chunks = [chunk for column in getattr(value, "columns", (value,)) for chunk in getattr(column, "chunks", (column,))]
    if len(chunks) > _MANY_CHUNKS:
        return id(value), int(value.get_total_buffer_size()), ()
    chunks += [chunk.dictionary for chunk in chunks if hasattr(chunk, "dictionary")]
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers() if buffer is not None]
    return id(value), 64, ((buffers, len(buffers)),)


def _arrow_buffer(value: Any) -> Parts:
    return ("arrow", value.address), int(value.size), ()


def _tensor(value: Any) -> Parts:
    try:
        storage = value.untyped_storage()
        key, size = ("torch", storage.data_ptr()), int(storage.nbytes())
    except Exception:
        return id(value), int(value.element_size() * value.nelement()), ()  # sparse ones have no storage
    gradient = value.grad if value.is_leaf else None
    return key, size, () if gradient is None else (((gradient,), 1),)


def _view(value: Any) -> Parts:
    exporter = value.obj
    if exporter is None or type(exporter).__name__ == "mmap":
        return id(value), value.nbytes, ()
    if (mapped := getattr(exporter, "mapped_bytes", None)) is not None:  # of a value file; the object itself may claim more
        return id(exporter), mapped, ()
    if _find(type(exporter), {}, {"numpy.ndarray": True}):
        return _array(exporter)
    with memoryview(exporter) as whole:
        return id(exporter), whole.nbytes, ()


_mapped_file = _counted_by(len)
_ctypes = _counted_by(lambda value: memoryview(value).nbytes, 80)
_polars = _counted_by(lambda value: value.estimated_size(), 64)

_FLAT = frozenset({_array, _mapped_array, _arrow_buffer, _tensor, _view, _mapped_file, _ctypes, _polars})
_EXACT: dict[type, Plan] = {list: _exact_sequence, tuple: _exact_sequence, dict: _exact_mapping}  # the same, faster
_TYPES: dict[type, Plan] = {
    **{kind: _sequence(kind) for kind in (list, tuple)},
    **{kind: _set(kind) for kind in (set, frozenset)},
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), _mapping),
    **dict.fromkeys((FunctionType, BuiltinFunctionType, ModuleType, CodeType), _nothing),
    deque: _deque,
    memoryview: _view,
    bytearray: _leaf,
}
_NAMES: dict[str, Plan] = {
    "numpy.memmap": _mapped_array,
    "numpy.ndarray": _array,
    "numpy.generic": _leaf,
    "pandas.DataFrame": _frame,
    "pandas.Series": _frame,
    "pandas.arrays.ArrowExtensionArray": _arrow_column,
    "pandas._libs.internals.BlockValuesRefs": _counted_by(lambda value: 210),  # weak references to who shares a block
    "pandas._libs.index.IndexEngine": _counted_by(lambda value: value.sizeof()),
    "pyarrow.lib.Buffer": _arrow_buffer,
    **dict.fromkeys(("pyarrow.lib.Array", "pyarrow.lib.ChunkedArray", "pyarrow.lib._Tabular"), _arrow),
    **dict.fromkeys(("polars.DataFrame", "polars.Series"), _polars),
    "torch.Tensor": _tensor,
    "mmap.mmap": _mapped_file,
    "_ctypes._CData": _ctypes,
}
