"""Device memory of one process read by another of the same host, for engines that share the trainer's devices.

torch's own handles do not open in an older torch (their format byte changed in 2.13), and travel as pickles. So: one
staging buffer of a plain ``cudaMalloc``, whose handle is 64 bytes of the driver's own. Nothing of torch's allocator is
shared. Every trainer rank stages its part of the weights once, so an engine also reads the other GPUs of its node, over
NVLink or PCIe; it need not see them (CUDA_VISIBLE_DEVICES), only reach them, as NCCL does since CUDA 10.1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hpt.checksum import checksum_of
from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.manifest import Piece
from megatron_hpt.transfer.transports.mapped import laid_out

_HANDLE_BYTES = 64
_FROM_DEVICE_TO_DEVICE = 3
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


def _runtime() -> ctypes.CDLL:
    """Return the CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError as error:
        raise TransferError(f"cuda_ipc needs the CUDA runtime that torch was built with: {error}") from None


def _check(code: int, what: str) -> None:
    if code:
        name = _runtime().cudaGetErrorString
        name.restype = ctypes.c_char_p
        raise TransferError(f"{what}: {name(code).decode()}")


def device_uuid() -> str:
    """Return the name by which any process of the host knows this process's GPU."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class _Array:
    """A piece of device memory as ``__cuda_array_interface__`` describes it."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _as_tensor(pointer: int, nbytes: int) -> Tensor:
    return torch.as_tensor(_Array(pointer, nbytes), device="cuda")


class DeviceSink:
    """Sending end on one rank: a staging buffer on its GPU, overwritten by every version."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Reserve the buffer.

        Raises:
            TransferError: the GPU has not that much memory left.
        """
        self.positions, nbytes = laid_out(sizes)
        runtime, pointer, handle = _runtime(), ctypes.c_void_p(), _Handle()
        _check(runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1))), f"{nbytes} bytes for weights")
        self._pointer = pointer
        _check(runtime.cudaIpcGetMemHandle(ctypes.byref(handle), pointer), "sharing the buffer of weights")
        self._bytes = _as_tensor(pointer.value, max(nbytes, 1))
        self.source = {"handle": bytes(handle).hex(), "nbytes": nbytes, "uuid": device_uuid()}

    def put(self, index: int, value: Tensor) -> int:
        """Copy a box into the buffer, and return its checksum."""
        target = self._bytes[self.positions[index] :][: value.nbytes].view(value.dtype).view(value.shape)
        target.copy_(value)
        return checksum_of(target)

    def commit(self, version: int) -> None:
        """Wait until the GPU has copied everything: receivers read in place."""
        torch.cuda.synchronize()

    def close(self) -> None:
        """Free the buffer."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        _check(_runtime().cudaFree(self._pointer), "freeing the buffer of weights")


class DeviceIncoming:
    """Receiving end: it reads the buffer of a sender on the same GPU in place, and copies each piece from other GPUs."""

    whole = True

    def __init__(self, sources: Sequence[dict[str, Any]], pieces: Sequence[tuple[int, Piece]]) -> None:
        """Open the buffers that this rank reads from.

        Raises:
            TransferError: a sender is gone, or on a GPU that this one cannot reach.
        """
        self._pieces = list(pieces)
        self._pointers: dict[int, ctypes.c_void_p] = {}
        self._here: dict[int, Tensor] = {}
        for number in sorted({piece.source for _, piece in pieces}):
            source = sources[number]
            pointer, handle = ctypes.c_void_p(), _Handle.from_buffer_copy(bytes.fromhex(source["handle"]))
            code = _runtime().cudaIpcOpenMemHandle(ctypes.byref(pointer), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            _check(code, f"opening the weights of actor rank {number} on GPU {source['uuid']} from {device_uuid()}")
            self._pointers[number] = pointer
            if source["uuid"] == device_uuid():
                self._here[number] = _as_tensor(pointer.value, max(int(source["nbytes"]), 1))

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """Yield all pieces at once: everything is within reach."""
        yield from self._pieces

    def view(self, number: int, piece: Piece) -> Tensor:
        """Return the bytes of a piece, [nbytes] uint8 on this process's GPU."""
        if piece.source in self._here:
            return self._here[piece.source][piece.position : piece.position + piece.nbytes]
        # torch would take the pointer for one of a device that this process may not even see.
        copy = torch.empty(piece.nbytes, dtype=torch.uint8, device="cuda")
        source = ctypes.c_void_p(self._pointers[piece.source].value + piece.position)
        size = ctypes.c_size_t(piece.nbytes)
        torch.cuda.synchronize()  # the allocator may give memory that a kernel of another stream still writes
        code = _runtime().cudaMemcpy(ctypes.c_void_p(copy.data_ptr()), source, size, _FROM_DEVICE_TO_DEVICE)
        _check(code, f"{piece.nbytes} bytes from the GPU of actor rank {piece.source}")
        torch.cuda.synchronize()
        return copy

    def close(self) -> None:
        """Close the buffers."""
        self._here.clear()
        for pointer in self._pointers.values():
            _check(_runtime().cudaIpcCloseMemHandle(pointer), "closing weights")
        self._pointers.clear()
