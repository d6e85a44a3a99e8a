"""One GPU through wgpu: buffers, shaders, recorded dispatches, and what comes back. The only file that calls wgpu.

wgpu-py carries the library and its header; what happens at every step goes straight to the C interface, because a step
has hundreds of calls. Shaders are built without bounds checks: whatever they take on trust is checked before
(``kernels/batch_checks.py``, and lowering for shapes). ``EDGELLM_GPU_CHECKED=1`` puts the checks back, and
``EDGELLM_GPU_LEAST=1`` takes no more of a device than WebGPU promises of every one.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgellm.formats.errors import DeviceLostError, EdgeLLMError, MemoryWouldExceedError
from edgellm.kernels.gpu.adapters import NEEDED, Adapter, quiet_stderr, wgpu_module
from edgellm.kernels.gpu.walk import Dispatch, Recording, Walk, native_walk, python_walk

ALIGN = 256  # of windows into a buffer, and of its size
MOST_NUMBERS = 32  # immediates of a dispatch, 128 bytes
MAX_GROUPS = 32768  # of workgroups in one dimension: a power of two below the limit of every device
LEAST = {
    "max-storage-buffers-per-shader-stage": 8, "max-storage-buffer-binding-size": 128 << 20,
    "max-buffer-size": 256 << 20, "max-compute-workgroup-storage-size": 16 << 10,
    "max-compute-invocations-per-workgroup": 256, "max-compute-workgroup-size-x": 256,
    "max-compute-workgroup-size-y": 256, "max-compute-workgroup-size-z": 64,
    "max-compute-workgroups-per-dimension": 65535,
}  # fmt: skip
UPLOAD_NBYTES = 16 << 20  # sent at once: the staging copy lives until it has arrived


class Pipeline(NamedTuple):
    """A compiled shader, and what its bindings look like."""

    handle: Any
    layout: Any
    kinds: str


class Device:
    """An open device. Not safe for several threads at once."""

    def __init__(self, adapter: Adapter, max_binding: int | None = None) -> None:
        """``max_binding`` lowers the limit of bytes that one binding may have."""
        self._wgpu = wgpu_module()
        from wgpu.backends.wgpu_native import _api
        from wgpu.backends.wgpu_native._ffi import ffi, lib

        self._api, self._ffi, self._lib = _api, ffi, lib
        self.adapter = adapter
        with quiet_stderr(), self._translated():
            limits = LEAST if _is_set("EDGELLM_GPU_LEAST") else {}
            self._device = adapter.handle.request_device_sync(required_features=list(NEEDED), required_limits=limits)
        limits = self._device.limits
        most = min(limits["max-storage-buffer-binding-size"], limits["max-buffer-size"])
        self.max_binding = min(most, max_binding or most) // ALIGN * ALIGN
        self.most_buffers = int(limits["max-storage-buffers-per-shader-stage"])  # of one shader
        self.workgroup_nbytes = int(limits["max-compute-workgroup-storage-size"])
        self.nbytes = 0  # in buffers
        self._pipelines: dict[tuple[str, str], Pipeline] = {}
        self._groups: dict[tuple[int, ...], Any] = {}
        self._buffers: list[Any] = []
        self._staging: Any = None
        self._mapped: list[int] = []
        self._is_checked = _is_set("EDGELLM_GPU_CHECKED")
        self._box = ffi.new("WGPUCommandBuffer[1]")
        self.walk: Walk = native_walk(lib, ffi) or python_walk(lib, ffi.NULL)

        @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")
        def mapped(status: int, _message: Any, _first: Any, _second: Any) -> None:
            self._mapped.append(status)

        self._map_callback = mapped

    # ---- memory ------------------------------------------------------------------------------------------------------

    def buffer(self, nbytes: int, *, staging: bool = False) -> Any:
        """Zeros on the device; ``staging`` is memory that the host can read."""
        usage = self._wgpu.BufferUsage
        flags = usage.MAP_READ | usage.COPY_DST if staging else usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        size = -(-max(nbytes, 4) // ALIGN) * ALIGN
        if size > self.max_binding and not staging:
            raise MemoryWouldExceedError(
                f"a buffer of {size:,} bytes; {self.adapter} binds at most {self.max_binding:,}. Take a smaller "
                "context (-c), or --device cpu."
            )
        with self._translated():
            made = self._device.create_buffer(size=size, usage=flags)
        self.nbytes += size
        self._buffers.append(made)
        return made

    def free(self, buffer: Any) -> None:
        """Let go of a buffer, and of all groups it is in."""
        self._buffers.remove(buffer)
        self.nbytes -= buffer.size
        self._groups = {key: group for key, group in self._groups.items() if id(buffer) not in key[1:]}
        buffer.destroy()

    def upload(self, array: np.ndarray) -> Any:
        """A buffer with these numbers."""
        buffer = self.buffer(array.nbytes)
        self.write(buffer, 0, array)
        return buffer

    def write(self, buffer: Any, offset: int, array: np.ndarray) -> None:
        """Put numbers into a buffer before whatever is submitted next; whole words of four bytes."""
        data = np.ascontiguousarray(array)
        if data.nbytes % 4:
            data = np.concatenate([data.reshape(-1).view(np.uint8), np.zeros(-data.nbytes % 4, np.uint8)])
        if data.nbytes:
            with self._translated():
                self._device.queue.write_buffer(buffer, offset, data)

    def read(self, buffer: Any, nbytes: int, offset: int = 0) -> np.ndarray:
        """Bytes of a buffer, after all that was submitted."""
        return self.run((), (buffer, offset, nbytes))

    # ---- shaders -----------------------------------------------------------------------------------------------------

    def pipeline(self, source: str, kinds: str, immediates: int) -> Pipeline:
        """A shader with bindings 'r' (read only) and 'w' (read and write), and so many bytes of immediates."""
        key = source, kinds
        if key not in self._pipelines:
            types = {"r": "read-only-storage", "w": "storage"}
            stage = self._wgpu.ShaderStage.COMPUTE
            with self._translated():
                layout = self._device.create_bind_group_layout(
                    entries=[
                        {"binding": i, "visibility": stage, "buffer": {"type": types[kind]}}
                        for i, kind in enumerate(kinds)
                    ]
                )
                whole = self._device.create_pipeline_layout(bind_group_layouts=[layout], immediate_size=immediates)
                compute = {"module": self._module(source), "entry_point": "main"}
                handle = self._device.create_compute_pipeline(layout=whole, compute=compute)
            self._pipelines[key] = Pipeline(handle, layout, kinds)
        return self._pipelines[key]

    def _module(self, source: str) -> Any:
        if self._is_checked:
            return self._device.create_shader_module(code=source)
        api, ffi = self._api, self._ffi
        code = api.new_struct_p("WGPUShaderSourceWGSL *", code=api.to_c_string_view(source))
        code[0].chain.next = ffi.NULL
        code[0].chain.sType = self._lib.WGPUSType_ShaderSourceWGSL
        described = api.new_struct_p(
            "WGPUShaderModuleDescriptor *",
            nextInChain=ffi.cast("WGPUChainedStruct *", code),
            label=api.to_c_string_view(""),
        )
        handle = api.libf.wgpuDeviceCreateShaderModuleTrusted(self._device._internal, described, 0)
        return api.GPUShaderModule("", handle, self._device)

    def group(self, pipeline: Pipeline, buffers: Sequence[Any]) -> Any:
        """The bindings of a shader, made once for the same buffers."""
        key = id(pipeline.layout), *map(id, buffers)
        if key not in self._groups:
            entries = [{"binding": i, "resource": {"buffer": buffer}} for i, buffer in enumerate(buffers)]
            with self._translated():
                self._groups[key] = self._device.create_bind_group(layout=pipeline.layout, entries=entries)
        return self._groups[key]

    def dispatch(
        self,
        source: str,
        buffers: Sequence[Any],
        kinds: str,
        grid: tuple[int, int, int],
        *immediates: float,
        flops: int = 0,
    ) -> Dispatch:
        """A row of a recording. Immediates that are whole numbers go as u32 (modulo 2^32), others as f32."""
        packed = b"".join(
            struct.pack("<f", value) if isinstance(value, float) else struct.pack("<I", value & 0xFFFFFFFF)
            for value in immediates
        )
        pipeline = self.pipeline(source, kinds, len(packed))
        group = self.group(pipeline, buffers)
        return Dispatch(pipeline.handle._internal, group._internal, *grid, packed, len(packed), flops)

    # ---- running -----------------------------------------------------------------------------------------------------

    def recording(self, rows: Sequence[Dispatch]) -> Recording:
        """Rows to be dispatched in order, as often as they are played."""
        return Recording(rows, self._address)

    def _address(self, handle: Any) -> int:
        return int(self._ffi.cast("intptr_t", handle))

    def run(self, rows: Sequence[Dispatch], result: tuple[Any, int, int] | None = None) -> np.ndarray:
        """Dispatch rows once; see ``play``."""
        return self.play([self.recording(rows)] if rows else [], result)

    def play(self, recordings: Sequence[Recording], result: tuple[Any, int, int] | None = None) -> np.ndarray:
        """Dispatch recordings in order as one submission, then read ``result``: (buffer, offset, bytes), if any.

        Submissions run one after the other; without a result it returns before this one has run.
        """
        lib, ffi, device = self._lib, self._ffi, self._device._internal
        with self._translated():
            encoder = lib.wgpuDeviceCreateCommandEncoder(device, ffi.NULL)
            if recordings:
                into = lib.wgpuCommandEncoderBeginComputePass(encoder, ffi.NULL)
                for recording in recordings:
                    self.walk(into, recording)
                lib.wgpuComputePassEncoderEnd(into)
                lib.wgpuComputePassEncoderRelease(into)
            size = 0
            if result is not None:
                buffer, offset, nbytes = result
                size = -(-nbytes // 4) * 4
                staging = self._staging_of(size)
                lib.wgpuCommandEncoderCopyBufferToBuffer(encoder, buffer._internal, offset, staging._internal, 0, size)
            self._submit(encoder)
            return self._read_staging(nbytes, size) if result is not None else np.empty(0, np.uint8)

    def _submit(self, encoder: Any) -> None:
        """End a recording and start it; what was wrong with it is raised here."""
        commands = self._api.libf.wgpuCommandEncoderFinish(encoder, self._ffi.NULL)
        self._lib.wgpuCommandEncoderRelease(encoder)
        self._box[0] = commands
        try:
            self._api.libf.wgpuQueueSubmit(self._device.queue._internal, 1, self._box)
        finally:
            self._lib.wgpuCommandBufferRelease(commands)

    def _staging_of(self, nbytes: int) -> Any:
        if self._staging is None or self._staging.size < nbytes:
            if self._staging is not None:
                self.free(self._staging)
            self._staging = self.buffer(nbytes, staging=True)
        return self._staging

    def _read_staging(self, nbytes: int, size: int) -> np.ndarray:
        lib, ffi, handle = self._lib, self._ffi, self._staging._internal
        self._mapped.clear()
        told = ffi.new("WGPUBufferMapCallbackInfo *")
        told.mode, told.callback = lib.WGPUCallbackMode_AllowSpontaneous, self._map_callback
        self._api.libf.wgpuBufferMapAsync(handle, lib.WGPUMapMode_Read, 0, size, told[0])
        lib.wgpuDevicePoll(self._device._internal, True, ffi.NULL)
        if not self._mapped or self._mapped[0] != lib.WGPUMapAsyncStatus_Success:
            raise DeviceLostError(_lost(self.adapter))
        try:
            view = ffi.buffer(lib.wgpuBufferGetConstMappedRange(handle, 0, size), size)
            return np.frombuffer(view, np.uint8)[:nbytes].copy()
        finally:
            lib.wgpuBufferUnmap(handle)

    def copy(self, pieces: Sequence[tuple[Any, int, int, int]]) -> None:
        """Copy (buffer, source, target, bytes) inside buffers, by way of one that is between: whole words."""
        lib, ffi = self._lib, self._ffi
        between = self.buffer(max((piece[3] for piece in pieces), default=0))
        with self._translated():
            encoder = lib.wgpuDeviceCreateCommandEncoder(self._device._internal, ffi.NULL)
            for buffer, source, target, nbytes in pieces:
                for one, at, other, to in (
                    (buffer, source, between, 0),
                    (between, 0, buffer, target),
                ):
                    lib.wgpuCommandEncoderCopyBufferToBuffer(encoder, one._internal, at, other._internal, to, nbytes)
            self._submit(encoder)
        self.free(between)

    def wait(self) -> None:
        """Until all that was submitted has run."""
        self._lib.wgpuDevicePoll(self._device._internal, True, self._ffi.NULL)

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        with contextlib.suppress(Exception):  # a device that was lost has nothing to give
            for buffer in self._buffers:
                buffer.destroy()
        self._buffers.clear()
        self._groups.clear()
        self._pipelines.clear()
        self._staging, self.nbytes = None, 0

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """wgpu's errors as ours."""
        try:
            yield
        except self._wgpu.GPUError as error:
            if "lost" in str(error).lower():
                raise DeviceLostError(_lost(self.adapter)) from error
            if isinstance(error, self._wgpu.GPUOutOfMemoryError):
                raise MemoryWouldExceedError(
                    f"{self.adapter} has no memory left ({self.nbytes >> 20} MiB of it are in use here). Take a "
                    "smaller context (-c), a smaller model, or --device cpu."
                ) from error
            raise EdgeLLMError(f"{self.adapter} refused: {error}", code="GPU_ERROR") from error


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _lost(adapter: Adapter) -> str:
    return (
        f"{adapter} was lost: its driver has started again, or took it away. Load the model again, or take "
        "--device cpu; a conversation goes on from its tokens."
    )
