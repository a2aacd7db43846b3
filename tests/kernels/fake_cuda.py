"""Tensors that claim to be on a GPU, to test on a CPU what a built kernel accepts.

A kernel compares device, dtype, rank, sizes, strides and alignment with what it was compiled for
before it launches anything. These tensors pass or fail that comparison; their memory does not
exist, and what is accepted fails later, at the launch, for want of a GPU.
"""

from __future__ import annotations

import ctypes

import torch
import tvm_ffi

DLPACK_CUDA = 2
ADDRESS = 1 << 20  # aligned, never read
_CODES = {torch.int32: (0, 32), torch.int64: (0, 64), torch.float32: (2, 32)}
_CODES |= {torch.float16: (2, 16), torch.bfloat16: (4, 16)}


class _Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Exporter:
    def __init__(self, tensor: _Tensor):
        self.tensor = tensor

    def __dlpack__(self, **_: object) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CUDA, 0


_alive: list[_Tensor] = []  # a consumer keeps pointers into these


def fake_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tvm_ffi.Tensor:
    """A contiguous tensor on a GPU that need not exist."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    vector = ctypes.c_int64 * len(shape)
    code, bits = _CODES[dtype]
    tensor = _Tensor(
        ADDRESS, DLPACK_CUDA, 0, len(shape), code, bits, 1, vector(*shape), vector(*strides), 0
    )
    _alive.append(tensor)
    return tvm_ffi.from_dlpack(_Exporter(tensor))
