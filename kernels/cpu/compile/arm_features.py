"""What an Arm CPU says of its products of bytes, asked of the system: LLVM does not find them everywhere."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

AT_HWCAP, AT_HWCAP2 = 16, 26

# feature in LLVM's name -> (entry of Linux's auxiliary vector, bit), name for macOS's sysctl
_FEATURES = {
    "dotprod": (AT_HWCAP, 20, b"hw.optional.arm.FEAT_DotProd"),
    "i8mm": (AT_HWCAP2, 13, b"hw.optional.arm.FEAT_I8MM"),
}


@functools.cache
def arm_features() -> dict[str, bool]:
    """Features that this CPU has, by LLVM's names; empty where it is no 64-bit Arm or the system does not say."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return {}
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return {feature: _sysctl(libc, name) for feature, (_, _, name) in _FEATURES.items()}
        libc.getauxval.restype, libc.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return {feature: bool(libc.getauxval(entry) >> bit & 1) for feature, (entry, bit, _) in _FEATURES.items()}
    except (OSError, AttributeError, TypeError):  # no libc to load, or without the function
        return {}


def _sysctl(libc: ctypes.CDLL, name: bytes) -> bool:
    value, nbytes = ctypes.c_int(0), ctypes.c_size_t(4)
    return libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(nbytes), None, 0) == 0 and value.value == 1
