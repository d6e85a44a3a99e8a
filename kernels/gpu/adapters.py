"""The GPUs of this machine by name: which there are, which is taken, and which only pretend to be one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgellm.formats.errors import ParameterError, UnsupportedError

NEEDED = ("immediates",)
"""Features without which no shader of ours runs, and all that are asked for, so every device has the same bits.

What others offer has no place yet. Subgroups: a thread owns a row's slice of a product, so nothing is added across a
subgroup, and a tree over 64 threads waits twice without one (shaders/tree.wgsl). shader-f16: drivers may round a
float32 to it as they like, so halves are made bit by bit, and products of halves are off by 2e-7 to 5e-6 (NMSE) where
these are by 1e-13. dot4I8Packed wants inputs of 8 bits, 1e-4 off, or each input twice, and is emulated where hardware
has none, which wgpu does not tell: a choice to be offered once it is measured on hardware, and no default.
"""

_PREFERRED = ("DiscreteGPU", "IntegratedGPU", "Unknown")  # best first
_SOFTWARE = {0x10005: "lavapipe", 0x1AE0: "SwiftShader", 0x1414: "WARP"}  # vendors that compute on the CPU
_stderr_lock = threading.Lock()


@dataclass(frozen=True)
class Adapter:
    """One device behind one of the interfaces that the system has for it.

    index      N of "gpu:N"
    kind       "DiscreteGPU", "IntegratedGPU", "CPU" or "Unknown"
    interface  "Vulkan", "Metal" or "D3D12"
    handle     wgpu's own object
    """

    index: int
    name: str
    kind: str
    interface: str
    driver: str
    is_software: bool
    missing: tuple[str, ...]
    handle: Any

    def __str__(self) -> str:
        software = ", software" if self.is_software else ""
        return f"gpu:{self.index} {self.name} ({self.interface}{software})"


def is_installed() -> bool:
    """Whether the extra is there; imports nothing."""
    return importlib.util.find_spec("wgpu") is not None


def wgpu_module() -> Any:
    """The wgpu package; UnsupportedError where it is not installed, or cannot be loaded here."""
    try:
        import wgpu
        import wgpu.backends.wgpu_native
    except Exception as error:  # also a library that the system is too old for
        raise UnsupportedError(
            f"The gpu device needs the package wgpu, which cannot be loaded ({error}). "
            'Install it: pip install "edgellm[gpu]".',
            code="GPU_PACKAGE",
        ) from None
    logging.getLogger("wgpu").addHandler(logging.NullHandler())  # its errors are raised; nothing goes to the screen
    return wgpu


@functools.cache
def adapters() -> tuple[Adapter, ...]:
    """All that there are, hardware first. OpenGL is left out; a card that has Vulkan is not named again for D3D12."""
    wgpu = wgpu_module()
    from wgpu.backends.wgpu_native import extras

    with quiet_stderr():
        with contextlib.suppress(Exception):  # only once in a process; another part may have done it
            extras.set_instance_extras(backends=("Vulkan", "Metal", "DX12"), flags=("DiscardHalLabels",))
        found = list(wgpu.gpu.enumerate_adapters_sync())
    by_rank: list[tuple[int, Any]] = []
    vulkan = {_card(handle.info) for handle in found if handle.info["backend_type"] == "Vulkan"}
    for handle in found:
        info = handle.info
        if info["backend_type"] not in ("Vulkan", "Metal", "D3D12"):
            continue
        if info["backend_type"] == "D3D12" and _card(info) in vulkan:
            continue
        by_rank.append((_PREFERRED.index(info["adapter_type"]) if _is_hardware(info) else len(_PREFERRED), handle))
    by_rank.sort(key=lambda pair: pair[0])
    return tuple(_described(index, handle) for index, (_, handle) in enumerate(by_rank))


def choose(index: int | None) -> Adapter:
    """The adapter of that number, or the best hardware. ParameterError names those that there are."""
    all_of_them = adapters()
    if index is not None:
        if 0 <= index < len(all_of_them):
            return _usable(all_of_them[index])
        raise ParameterError(f"There is no gpu:{index}. This machine has {_listed(all_of_them)}.")
    hardware = [adapter for adapter in all_of_them if not adapter.is_software and not adapter.missing]
    if not hardware:
        raise ParameterError(
            f"No GPU was found that edgellm can use; this machine has {_listed(all_of_them)}. Take --device cpu"
            + (", or name one of these." if all_of_them else ".")
        )
    return hardware[0]


def _usable(adapter: Adapter) -> Adapter:
    if adapter.missing:
        raise UnsupportedError(
            f"{adapter} lacks {', '.join(adapter.missing)}, which the shaders need. Update its driver, or take "
            "--device cpu.",
            code="GPU_FEATURE",
        )
    return adapter


def _listed(found: tuple[Adapter, ...]) -> str:
    return ", ".join(map(str, found)) or "no adapter for Vulkan, Metal or Direct3D 12"


def _card(info: Any) -> tuple[Any, Any]:
    return info["vendor_id"], info["device_id"]


def _is_hardware(info: Any) -> bool:
    return info["adapter_type"] in _PREFERRED and info["vendor_id"] not in _SOFTWARE


def _described(index: int, handle: Any) -> Adapter:
    info = handle.info
    missing = tuple(name for name in NEEDED if name not in handle.features)
    driver = " ".join(str(info.get("description") or "").split())
    return Adapter(
        index, str(info["device"]), str(info["adapter_type"]), str(info["backend_type"]), driver,
        not _is_hardware(info), missing, handle,
    )  # fmt: skip


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drivers write to the file descriptor of standard error while they start; that would soil a full screen."""
    with _stderr_lock:
        sys.stderr.flush()
        try:
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        except OSError:  # there is no standard error
            yield
            return
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)
