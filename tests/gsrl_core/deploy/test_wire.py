import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gsrl_core.deploy import wire
from gsrl_core.errors import PackageError


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["u1", "<i4", "<i8", "<f4", "<f8", "?", "<U3"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    )
)
def test_arrays_come_back_bit_for_bit(array):
    back = wire.unpack(wire.pack({"a": array}))["a"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_the_wire_format_is_openpis():
    raw = msgpack.unpackb(wire.pack({"x": np.array([[1.0, 2.0]], np.float32), "n": np.int64(3)}), strict_map_key=False)
    assert raw["x"] == {
        b"__ndarray__": True,
        b"data": np.array([1.0, 2.0], "<f4").tobytes(),
        b"dtype": "<f4",
        b"shape": [1, 2],
    }
    assert raw["n"] == {b"__npgeneric__": True, b"data": 3, b"dtype": "<i8"}
    assert wire.unpack(wire.pack({"n": np.float32(0.5)}))["n"].dtype == np.float32


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1 + 2j]), np.zeros(2, "V4"), object()])
def test_what_openpi_refuses_is_refused(value):
    with pytest.raises(PackageError):
        wire.pack({"x": value})


@pytest.mark.parametrize(
    "array",
    [
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "O", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [2]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [-1, -1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "nonsense", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234"},
    ],
)
def test_forged_arrays_are_refused(array):
    with pytest.raises(PackageError):
        wire.unpack(msgpack.packb({"x": array}))


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x92\x01", b"\x01\x02"])
def test_broken_messages_are_refused(message):
    with pytest.raises(PackageError, match="msgpack"):
        wire.unpack(message)
