// Fourth: the k largest in order, of equals the first first. The state is made zero for the next token.
// found, row by row from ``to`` on: 0 not finite | 1 candidates | 2 sum | 3 the token that is gone on with | then k pairs of position and logit
struct P { k: u32, slices: u32, to: u32 }
@group(0) @binding(0) var<storage, read_write> state: array<u32>;
@group(0) @binding(1) var<storage, read> candidates: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> found: array<u32>;
var<immediate> p: P;
var<workgroup> a: array<vec2<u32>, $ROOM>;
$KEYS
fn before(u: vec2<u32>, v: vec2<u32>) -> bool { return u.x > v.x || (u.x == v.x && u.y < v.y); }
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = g.y * (4u + p.slices + 4096u);  // of this row's state
  let to = p.to + g.y * (4u + 2u * p.k);
  let n = min(state[at + 3u], $ROOM);
  for (var i = t; i < $ROOM; i += 256u) {
    if (i < n) { a[i] = candidates[g.y * $ROOM + i]; } else { a[i] = vec2<u32>(0u, 0xffffffffu); }
  }
  workgroupBarrier();
  for (var size = 2u; size <= $ROOM; size *= 2u) {
    for (var d = size / 2u; d > 0u; d /= 2u) {
      for (var i = t; i < $ROOM / 2u; i += 256u) {
        let low = 2u * d * (i / d) + i % d;
        let high = low + d;
        if (before(a[high], a[low]) == ((low & size) == 0u)) {
          let v = a[low];
          a[low] = a[high];
          a[high] = v;
        }
      }
      workgroupBarrier();
    }
  }
  for (var i = t; i < p.k; i += 256u) {
    found[to + 4u + 2u * i] = a[i].y;
    found[to + 5u + 2u * i] = unkey(a[i].x);
  }
  if (t == 0u) {
    var sum = 0.0;
    for (var i = 0u; i < p.slices; i++) { sum += bitcast<f32>(state[at + 4u + i]); }
    found[to] = state[at + 1u];
    found[to + 1u] = state[at + 3u];
    found[to + 2u] = bitcast<u32>(sum);
    state[at] = 0u;
    state[at + 1u] = 0u;
    state[at + 3u] = 0u;
  }
}
