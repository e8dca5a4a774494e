# SPDX-License-Identifier: Apache-2.0
"""Device memory: bytes, and for each byte whether it was written. Every buffer has an address window of its own."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np

from .build import core

_windows = itertools.count()
POISON = 0xFF  # what was never written reads as NaN


def _next_address() -> int:
    machine = core()
    return (machine.FIRST_WINDOW + next(_windows)) << machine.WINDOW_BITS


class Buffer:
    """buffer(array): a copy of it, initialised. buffer(shape, dtype) or buffer.empty(nbytes): not initialised.

    writable=False reports every write; races=False keeps no access history (24 bytes a byte) for a very large buffer.
    """

    def __init__(
        self, array_or_shape, dtype=None, name: str | None = None, *, writable: bool = True, races: bool = True
    ):
        if isinstance(array_or_shape, (int, tuple)):
            self.shape, self.dtype = array_or_shape, np.dtype(np.uint8 if dtype is None else dtype)
            nbytes = int(np.prod(array_or_shape)) * self.dtype.itemsize
            self.bytes, self.state = np.full(nbytes, POISON, np.uint8), np.zeros(nbytes, np.uint8)
        else:
            array = np.array(array_or_shape, dtype, order="C")
            self.shape, self.dtype = array.shape, array.dtype
            self.bytes = array.reshape(-1).view(np.uint8)
            self.state = np.ones(self.bytes.size, np.uint8)
        self.name, self.writable, self.races, self.address = name, writable, races, _next_address()

    @classmethod
    def empty(cls, nbytes: int, name: str | None = None, **options) -> Buffer:
        return cls(int(nbytes), np.uint8, name, **options)

    @classmethod
    def at(cls, address: int, nbytes: int, name: str | None = None, *, initialised: bool = True, **options) -> Buffer:
        """Host memory at its own address, shared and not copied: kernels run on the tensors of a CPU allocator."""
        self = cls(0, np.uint8, name, **options)
        self.shape, self.address = (nbytes,), address
        if nbytes:
            self.bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
        self.state = np.full(nbytes, int(initialised), np.uint8)
        return self

    @classmethod
    def window(cls, address: int, array, name: str | None = None, **options) -> Buffer:
        """A part of a tensor that is too large to exist: `address` is that of its first element."""
        self = cls(array, name=name, **options)
        self.address = address
        return self

    @property
    def nbytes(self) -> int:
        return self.bytes.size

    @property
    def array(self) -> np.ndarray:
        """The contents, in the shape and dtype that it was made with."""
        return self.bytes.view(self.dtype).reshape(self.shape)

    def numpy(self, dtype=None) -> np.ndarray:
        """The contents as a vector of dtype."""
        return self.bytes.view(self.dtype if dtype is None else dtype)

    def initialised(self) -> np.ndarray:
        """For each byte whether it was written (by the host or by a kernel)."""
        return self.state == 1

    def __add__(self, nbytes: int) -> Pointer:
        return Pointer(self, nbytes)


class Pointer:
    """An address inside a buffer."""

    def __init__(self, buffer: Buffer, offset: int):
        self.buffer, self.offset = buffer, offset

    @property
    def address(self) -> int:
        return self.buffer.address + self.offset


buffer = Buffer
