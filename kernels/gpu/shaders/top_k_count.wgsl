// The largest logits of a vocabulary, of each row (g.y), in four steps. First: how many there are by the upper bits of their keys, which
// order as the numbers do; the largest; and whether one is no finite number.
// state: 0 largest key | 1 not finite | 2 threshold | 3 candidates | 4 ... sums of slices | then the counts
struct P { n: u32, slices: u32, x_at: u32, x_row: u32 }
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> state: array<atomic<u32>>;
var<immediate> p: P;
$KEYS
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = g.y * (4u + p.slices + 4096u);  // of this row's state
  let x0 = p.x_at + g.y * p.x_row;
  for (var i = g.x * $SLICE + t; i < min((g.x + 1u) * $SLICE, p.n); i += 256u) {
    let bits = x[x0 + i];
    if ((bits & 0x7f800000u) == 0x7f800000u) { atomicOr(&state[at + 1u], 1u); }
    atomicMax(&state[at], key(bits));
    atomicAdd(&state[at + 4u + p.slices + (key(bits) >> 20u)], 1u);
  }
}
