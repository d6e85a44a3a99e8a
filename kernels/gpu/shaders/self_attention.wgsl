// One workgroup: a query head of a token, over all tokens of its text, 64 at a time from the first on. What was summed
// so far is scaled when a larger score comes, so a token has the same bits whatever texts stand beside its own.
struct P { per_kv: u32, reach: u32, q_at: u32, q_row: u32, k_at: u32, k_row: u32, v_at: u32, v_row: u32, y_at: u32, y_row: u32, scale: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
$BINDINGS
var<immediate> p: P;
var<workgroup> query: array<f32, $DIM_K>;
var<workgroup> powers: array<f32, 64>;
const NONE = -1e30;
const OWN = ($DIM_V + 63u) / 64u;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = g.y;
  let first = b[b[4] + at];
  let stop = b[b[4] + b[0] + at];
  let kv = g.x / p.per_kv;
  for (var d = t; d < $DIM_K; d += 64u) { query[d] = $q[p.q_at + at * p.q_row + g.x * $DIM_K + d] * p.scale; }
  var acc: array<f32, OWN>;
  for (var k = 0u; k < OWN; k++) { acc[k] = 0.0; }
  var most = NONE;
  var sum = 0.0;
  var begin = first;
  if (p.reach > 0u && at - first > p.reach) { begin = first + (at - first - p.reach) / 64u * 64u; }
  var end = stop;
  if (p.reach > 0u) { end = min(stop, at + p.reach + 1u); }
  workgroupBarrier();
  for (var base = begin; base < end; base += 64u) {
    let i = base + t;
    var score = NONE;
    if (i < end && (p.reach == 0u || max(i, at) - min(i, at) <= p.reach)) {
      score = 0.0;
      for (var d = 0u; d < $DIM_K; d++) { score = fma(query[d], $k[p.k_at + i * p.k_row + kv * $DIM_K + d], score); }
      score = score $FADE;
    }
    let top = max(most, largest_of(score, t));
    powers[t] = select(exp(score - top), 0.0, score == NONE);
    let factor = exp(most - top);
    sum = fma(sum, factor, total(powers[t], t));
    most = top;
    let n = min(end - base, 64u);
    for (var k = 0u; k < OWN; k++) {
      let d = t + 64u * k;
      if (d < $DIM_V) {
        var v = acc[k] * factor;
        for (var j = 0u; j < n; j++) { v = fma(powers[j], $v[p.v_at + (base + j) * p.v_row + kv * $DIM_V + d], v); }
        acc[k] = v;
      }
    }
    workgroupBarrier();
  }
  for (var k = 0u; k < OWN; k++) {
    let d = t + 64u * k;
    if (d < $DIM_V) { $o[p.y_at + at * p.y_row + g.x * $DIM_V + d] = acc[k] / sum; }
  }
}
$LARGEST_OF
$TOTAL
