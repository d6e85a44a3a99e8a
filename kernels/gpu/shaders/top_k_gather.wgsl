// Third: those from the threshold on, in any order, and the sum of exp(logit - the largest) of each slice.
struct P { n: u32, slices: u32, x_at: u32, x_row: u32 }
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> state: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> candidates: array<vec2<u32>>;
var<immediate> p: P;
var<workgroup> part: array<f32, 256>;
$KEYS
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = g.y * (4u + p.slices + 4096u);  // of this row's state
  let x0 = p.x_at + g.y * p.x_row;
  let most = bitcast<f32>(unkey(atomicLoad(&state[at])));
  let threshold = atomicLoad(&state[at + 2u]);
  var sum = 0.0;
  for (var i = g.x * $SLICE + t; i < min((g.x + 1u) * $SLICE, p.n); i += 256u) {
    let k = key(x[x0 + i]);
    sum += exp(bitcast<f32>(x[x0 + i]) - most);
    if ((k >> 20u) >= threshold) {
      let place = atomicAdd(&state[at + 3u], 1u);
      if (place < $ROOM) { candidates[g.y * $ROOM + place] = vec2<u32>(k, i); }
    }
  }
  part[t] = sum;
  workgroupBarrier();
  for (var half = 128u; half > 0u; half /= 2u) {
    if (t < half) { part[t] += part[t + half]; }
    workgroupBarrier();
  }
  if (t == 0u) { atomicStore(&state[at + 4u + g.x], bitcast<u32>(part[0])); }
}
