"""How much memory a GPU has, which wgpu does not tell: Vulkan's heaps, asked for without another package."""

from __future__ import annotations

import ctypes as c
import sys
from typing import Any, ClassVar

from edgellm.kernels.gpu.adapters import Adapter, quiet_stderr
from edgellm.machine.memory import SystemMemory

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


def own_memory(adapter: Adapter) -> SystemMemory | None:
    """The memory of an adapter that does not share the system's; None where it does, or nobody tells."""
    if adapter.kind != "DiscreteGPU":
        return None
    with quiet_stderr():
        try:
            return _vulkan_heaps().get(adapter.name)
        except (OSError, AttributeError):  # no Vulkan, or one before 1.1
            return None


def _vulkan_heaps() -> dict[str, SystemMemory]:
    """For each device that Vulkan names, its largest heap of its own and what is free of it."""
    vulkan, instance, n = c.CDLL(LIBRARIES.get(sys.platform, "libvulkan.so.1")), c.c_void_p(), c.c_uint32()
    application = _Application(0, None, b"edgellm", 1, None, 0, _VERSION_1_1)
    info = _InstanceInfo(1, None, 0, c.pointer(application), 0, None, 0, None)
    if vulkan.vkCreateInstance(c.byref(info), None, c.byref(instance)):
        return {}
    try:
        vulkan.vkEnumeratePhysicalDevices(instance, c.byref(n), None)
        devices = (c.c_void_p * n.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, c.byref(n), devices)
        return dict(_heap(vulkan, c.c_void_p(device)) for device in devices)
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _heap(vulkan: Any, device: c.c_void_p) -> tuple[str, SystemMemory]:
    properties = (c.c_uint8 * 1024)()
    vulkan.vkGetPhysicalDeviceProperties(device, properties)
    budget = _Budget(_BUDGET, None)
    memory = _Memory(_PROPERTIES_2, c.cast(c.pointer(budget), c.c_void_p))
    vulkan.vkGetPhysicalDeviceMemoryProperties2(device, c.byref(memory))
    own = [i for i in range(memory.n_heaps) if memory.heaps[i].flags & DEVICE_LOCAL]
    largest = max(own, key=lambda i: memory.heaps[i].size, default=0)
    size = memory.heaps[largest].size
    # without the extension that tells the budget it stays 0
    free = max(0, budget.budget[largest] - budget.usage[largest]) if budget.budget[largest] else size
    return bytes(properties[20:276]).split(b"\0")[0].decode(errors="replace"), SystemMemory(size, free)
