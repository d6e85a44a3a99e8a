"""How fast a GPU copies its own memory by a plain shader: what decoding, which reads all weights, can reach."""

from __future__ import annotations

import time

from edgellm.kernels.gpu import adapters
from edgellm.kernels.gpu.device import MAX_GROUPS, Device

NBYTES = 128 << 20  # far more than any cache of a GPU but the largest
PASSES, COPIES = 3, 8
SHADER = """
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;
var<immediate> n: u32;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_id) l: vec3<u32>) {
  let i = (g.y * MAX_GROUPS + g.x) * 256u + l.x;
  if (i < n) { y[i] = x[i]; }
}
"""


def copy_bandwidth(index: int | None, nbytes: int = NBYTES) -> float:
    """Bytes per second that are read and written together, the best of a few passes."""
    gpu = Device(adapters.choose(index))
    try:
        n = min(nbytes, gpu.max_binding) // 16
        buffers = [gpu.buffer(16 * n) for _ in range(2)]
        groups = -(-n // 256)
        grid = min(groups, MAX_GROUPS), -(-groups // MAX_GROUPS), 1
        source = SHADER.replace("MAX_GROUPS", f"{MAX_GROUPS}u")
        there, back = (gpu.dispatch(source, pair, "rw", grid, n) for pair in (buffers, buffers[::-1]))
        best = float("inf")
        for _ in range(PASSES + 1):  # the first one has the shader compiled
            started = time.perf_counter()
            gpu.run([there, back] * (COPIES // 2))
            gpu.wait()
            best = min(best, time.perf_counter() - started)
        return 2 * 16 * n * COPIES / best
    finally:
        gpu.close()
