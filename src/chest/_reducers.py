"""How large values of numpy, polars and torch take themselves apart, so that their memory reaches the file as it is.

Each of these packages pickles some values by copying them into ``bytes``: numpy what is not contiguous or holds dates,
polars every frame, torch every tensor. ``bytes`` in a pickle cannot be mapped when they are loaded. The reducers here
describe the same values by buffers instead, and only in terms of the package concerned, so that plain ``pickle.load``
needs nothing of chest. What they do not know they leave to the value's own ``__reduce_ex__``.

They stand in a ``dispatch_table`` rather than in ``reducer_override``: looked up by exact type, so that subclasses keep
their own way and no Python function is called for all the other objects of a value. What the user has registered with
``copyreg`` goes first. No package is imported: a value of a package exists only where the package does.
"""

from __future__ import annotations

import copyreg
import sys
import types
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any

__all__ = ["LARGE", "table"]

LARGE = 64 << 10  # the C pickler hands buffers of at least this many bytes over without copying them

_Reducer = Callable[[Any], Any]


def table(*, small: bool = False) -> dict[type, _Reducer] | None:
    """The dispatch table for a pickler, None where ``copyreg``'s own will do.

    Args:
        small: only values below ``LARGE`` are to be pickled, or none that is to be mapped.
    """
    modules = sys.modules
    found: dict[type, _Reducer] = {}
    # Half-imported modules (another thread is at it) have no values yet, and perhaps no classes.
    torch = modules.get("torch")
    if torch is not None and hasattr(torch, "Tensor") and hasattr(torch, "from_numpy"):
        found[torch.Tensor] = _reduce_tensor
        found[types.BuiltinFunctionType] = found[types.MethodDescriptorType] = _reduce_torch_function
    if not small:
        numpy = modules.get("numpy")
        if numpy is not None and hasattr(numpy, "ndarray"):
            found[numpy.ndarray] = _reduce_array
        polars = modules.get("polars")
        if polars is not None and hasattr(polars, "DataFrame") and hasattr(polars, "Series"):
            found[polars.DataFrame] = _reduce_frame
            found[polars.Series] = _reduce_series
    if not found:
        return None
    found.update(copyreg.dispatch_table)
    return found


def _reduce_array(array: Any) -> Any:
    dtype = array.dtype
    if array.nbytes >= LARGE and not dtype.hasobject:
        flags = array.flags
        if not flags.forc:
            # numpy would make a copy too, but as bytes, and would forget that the array was read-only.
            writable = flags.writeable
            array = array.copy(order="C")
            array.flags.writeable = writable
        try:
            PickleBuffer(array)
        except (ValueError, BufferError):
            # Dates, records of dates and types from outside numpy have no buffer; the plain bytes below them do.
            return type(array).view, (array.view(f"V{dtype.itemsize}"), dtype)
    return array.__reduce_ex__(5)


def _reduce_frame(frame: Any) -> Any:
    if frame.estimated_size() >= LARGE:
        polars: Any = sys.modules["polars"]
        try:
            # In one chunk, as polars makes it on loading: then nothing is copied there, and it pickles alike again.
            arrow = frame.rechunk().to_arrow(compat_level=polars.CompatLevel.newest())
            if _compact(arrow, frame) and polars.DataFrame(arrow).schema == frame.schema:
                return type(frame), (arrow,)
        except Exception:
            pass  # no Arrow here, or a type that Arrow does not know: polars' own way is slower but does it
    return frame.__reduce_ex__(5)


def _reduce_series(series: Any) -> Any:
    if series.estimated_size() >= LARGE:
        polars: Any = sys.modules["polars"]
        try:
            arrow = series.rechunk().to_arrow(compat_level=polars.CompatLevel.newest())
            if _compact(arrow, series) and polars.Series(series.name, arrow).dtype == series.dtype:
                return type(series), (series.name, arrow)
        except Exception:
            pass  # as above
    return series.__reduce_ex__(5)


def _compact(arrow: Any, value: Any) -> bool:
    """Whether the buffers hold little beyond the value: Arrow writes the whole buffers below a slice.

    Text takes 16 bytes a piece that polars does not count.
    """
    cells = 1
    for n in value.shape:
        cells *= n
    return bool(arrow.get_total_buffer_size() <= 2 * value.estimated_size() + 32 * cells)


def _reduce_tensor(tensor: Any) -> Any:
    # torch's own way copies the storage, and names it by its address: equal tensors then pickle to different bytes.
    torch: Any = sys.modules["torch"]
    try:
        plain = (
            tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and not tensor.requires_grad
            and not tensor.is_quantized
            and tensor.is_contiguous()
            and not tensor.__dict__
            and not tensor._backward_hooks
            and not any(getattr(tensor, "names", ()))  # gone from newer torch
        )
        dtype = tensor.dtype
        if plain and dtype.is_floating_point and tensor.element_size() <= 2 and dtype is not torch.float16:
            # bfloat16 and its smaller kin, which numpy lacks, travel as integers.
            bits = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)
            bits.numpy()
            return torch.Tensor.view, (bits, dtype)
        if plain:
            return torch.from_numpy, (tensor.numpy(),)
    except (AttributeError, RuntimeError, TypeError):
        pass  # lazily conjugated or negated, wrapped by a transform, or of a type that numpy lacks
    return tensor.__reduce_ex__(5)


def _reduce_torch_function(function: Any) -> Any:
    """Name the two functions used above by their public places; left alone, they name torch's private C classes."""
    torch: Any = sys.modules["torch"]
    if function is torch.from_numpy:
        return "from_numpy"
    if function is torch.Tensor.view:
        return getattr, (torch.Tensor, "view")
    return function.__reduce_ex__(5)
