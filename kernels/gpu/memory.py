"""How much memory a GPU has, which wgpu does not tell: Vulkan's heaps, asked for without another package.

A card has memory of its own. Everything else computes in the system's: no more of it than its driver tells of, and on
Metal than three quarters, which is about what Apple recommends.
"""

from __future__ import annotations

import ctypes as c
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from edgellm.kernels.gpu.adapters import Adapter, quiet_stderr
from edgellm.machine.memory import system_memory

LIBRARIES = {"win32": "vulkan-1.dll"}
DEVICE_LOCAL = 1
_BUDGET, _PROPERTIES_2 = 1000237000, 1000059006  # VkStructureType
_VERSION_1_1 = (1 << 22) | (1 << 12)


class _Application(c.Structure):
    _fields_: ClassVar = [("type", c.c_uint32), ("next", c.c_void_p), ("name", c.c_char_p), ("version", c.c_uint32),
                          ("engine", c.c_char_p), ("engine_version", c.c_uint32), ("api", c.c_uint32)]  # fmt: skip


class _InstanceInfo(c.Structure):
    _fields_: ClassVar = [("type", c.c_uint32), ("next", c.c_void_p), ("flags", c.c_uint32),
                          ("application", c.POINTER(_Application)), ("n_layers", c.c_uint32), ("layers", c.c_void_p),
                          ("n_extensions", c.c_uint32), ("extensions", c.c_void_p)]  # fmt: skip


class _MemoryType(c.Structure):
    _fields_: ClassVar = [("flags", c.c_uint32), ("heap", c.c_uint32)]


class _Heap(c.Structure):
    _fields_: ClassVar = [("size", c.c_uint64), ("flags", c.c_uint32)]


class _Memory(c.Structure):
    _fields_: ClassVar = [("type", c.c_uint32), ("next", c.c_void_p), ("n_types", c.c_uint32),
                          ("types", _MemoryType * 32), ("n_heaps", c.c_uint32), ("heaps", _Heap * 16)]  # fmt: skip


class _Budget(c.Structure):
    _fields_: ClassVar = [("type", c.c_uint32), ("next", c.c_void_p), ("budget", c.c_uint64 * 16),
                          ("usage", c.c_uint64 * 16)]  # fmt: skip


class DeviceMemory(NamedTuple):
    """Bytes that a device can use, and that are free of them; ``is_own`` where they are not the system's."""

    total: int
    available: int
    is_own: bool


def device_memory(adapter: Adapter) -> DeviceMemory:
    """The memory of an adapter, as far as anybody tells; else the system's."""
    heaps = () if adapter.is_software else _told_of(adapter.name)
    if adapter.kind == "DiscreteGPU" and (own := [heap for heap in heaps if heap.is_own]):
        return max(own)
    system = system_memory()
    total, free = system.total, system.available
    if adapter.interface == "Metal":
        total, free = total * 3 // 4, min(free, total * 3 // 4)
    if heaps:
        total, free = min(total, sum(h.total for h in heaps)), min(free, sum(h.available for h in heaps))
    return DeviceMemory(total, free, is_own=False)


def _told_of(name: str) -> Sequence[DeviceMemory]:
    """The heaps of a device that Vulkan knows by this name."""
    with quiet_stderr():
        try:
            return _vulkan_heaps().get(name, ())
        except (OSError, AttributeError):  # no Vulkan, or one before 1.1
            return ()


def _vulkan_heaps() -> dict[str, list[DeviceMemory]]:
    """The heaps of each device that Vulkan names."""
    vulkan, instance, n = c.CDLL(LIBRARIES.get(sys.platform, "libvulkan.so.1")), c.c_void_p(), c.c_uint32()
    application = _Application(0, None, b"edgellm", 1, None, 0, _VERSION_1_1)
    info = _InstanceInfo(1, None, 0, c.pointer(application), 0, None, 0, None)
    if vulkan.vkCreateInstance(c.byref(info), None, c.byref(instance)):
        return {}
    try:
        vulkan.vkEnumeratePhysicalDevices(instance, c.byref(n), None)
        devices = (c.c_void_p * n.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, c.byref(n), devices)
        found: dict[str, list[DeviceMemory]] = {}
        for name, heaps in (_heaps(vulkan, c.c_void_p(device)) for device in devices):
            known = found.get(name, heaps)  # of two alike cards the one that has less left
            found[name] = min(known, heaps, key=lambda them: sum(heap.available for heap in them))
        return found
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _heaps(vulkan: Any, device: c.c_void_p) -> tuple[str, list[DeviceMemory]]:
    properties = (c.c_uint8 * 1024)()
    vulkan.vkGetPhysicalDeviceProperties(device, properties)
    budget = _Budget(_BUDGET, None)
    memory = _Memory(_PROPERTIES_2, c.cast(c.pointer(budget), c.c_void_p))
    vulkan.vkGetPhysicalDeviceMemoryProperties2(device, c.byref(memory))
    found = []
    for heap, most, used in zip(memory.heaps[: memory.n_heaps], budget.budget, budget.usage, strict=False):
        # without the extension that tells the budget it stays 0
        free = min(heap.size, max(0, most - used)) if most else heap.size
        found.append(DeviceMemory(heap.size, free, bool(heap.flags & DEVICE_LOCAL)))
    return bytes(properties[20:276]).split(b"\0")[0].decode(errors="replace"), found
