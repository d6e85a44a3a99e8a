// One workgroup: a query token, $HEADS query heads that share keys, and 256 positions of the cache. These parts lie at
// fixed positions and are summed in their order, so a token gets the same bits in every batch.
struct P { group: u32, window: u32, parts: u32, n_heads: u32, n_kv_heads: u32, per_kv: u32, first: u32, q_at: u32, q_row: u32, y_at: u32, y_row: u32, scale: f32, cap: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> values: array<u32>;
$BINDINGS
var<immediate> p: P;
const NONE = -1e30;
var<workgroup> qs: array<f32, $HEADS * $DIM_K>;
var<workgroup> scores: array<f32, $HEADS * 256u>;
var<workgroup> reduced: array<f32, 64>;
var<workgroup> sums: array<f32, $HEADS>;  // what the values are divided by, behind
var<workgroup> factors: array<f32, $HEADS>;  // what they are multiplied with
$FUNCTIONS
fn capped(score: f32) -> f32 { return softcap(score, p.cap); }
fn two_values(e: u32) -> vec2<f32> {
  if ($DIM_V % 2u == 0u || e % 2u == 0u) { return unpack2x16float(values[e / 2u]); }
  return vec2<f32>(unpack2x16float(values[e / 2u]).y, unpack2x16float(values[e / 2u + 1u]).x);
}
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let token = p.first + g.z;
  let kv = g.y / p.per_kv;
  let head0 = g.y * $HEADS;
  let at = seen_by(token);
  let base = g.x * 256u;
  let end_of_window = position_of(token) + 1u;
  let seen = select(0u, end_of_window - min(end_of_window, p.window), p.window > 0u);
  if (base > at || base + 256u <= seen) { return; }
  for (var i = t; i < $HEADS * $DIM_K; i += 64u) { qs[i] = $q[p.q_at + token * p.q_row + head0 * $DIM_K + i] * p.scale; }
  workgroupBarrier();
  for (var pair = t; pair < 128u; pair += 64u) {
    let i = base + 2u * pair;
    var s: array<vec2<f32>, $HEADS>;
    for (var h = 0u; h < $HEADS; h++) { s[h] = vec2<f32>(0.0); }
    if (i <= at && i + 1u >= seen) {
      let k0 = (table_entry(p.group, token, i / 32u) * p.n_kv_heads + kv) * $DIM_K * 16u + (i % 32u) / 2u;
      for (var d = 0u; d < $DIM_K; d++) {
        let k = unpack2x16float(keys[k0 + d * 16u]);
        for (var h = 0u; h < $HEADS; h++) { s[h] = fma(vec2<f32>(qs[h * $DIM_K + d]), k, s[h]); }
      }
    }
    for (var h = 0u; h < $HEADS; h++) {
      scores[h * 256u + 2u * pair] = select(NONE, $CAP(s[h].x), i <= at && i >= seen);
      scores[h * 256u + 2u * pair + 1u] = select(NONE, $CAP(s[h].y), i + 1u <= at && i + 1u >= seen);
    }
  }
  workgroupBarrier();
  for (var h = 0u; h < $HEADS; h++) {
    var most = NONE;
    for (var i = t; i < 256u; i += 64u) { most = max(most, scores[h * 256u + i]); }
    reduced[t] = most;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
      if (t < half) { reduced[t] = max(reduced[t], reduced[t + half]); }
      workgroupBarrier();
    }
    most = reduced[0];
    workgroupBarrier();
    var sum = 0.0;
    for (var i = t; i < 256u; i += 64u) {
      let e = select(exp(scores[h * 256u + i] - most), 0.0, scores[h * 256u + i] == NONE);
      scores[h * 256u + i] = e;
      sum += e;
    }
    reduced[t] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
      if (t < half) { reduced[t] += reduced[t + half]; }
      workgroupBarrier();
    }
    if (t == 0u) {
      $KEEP_SUM
    }
    workgroupBarrier();
  }
  let end = min(at - base + 1u, 256u);
  for (var d = 2u * t; d < $DIM_V; d += 128u) {
    var acc: array<vec2<f32>, $HEADS>;
    for (var h = 0u; h < $HEADS; h++) { acc[h] = vec2<f32>(0.0); }
    for (var i = select(0u, seen - base, seen > base); i < end; i++) {
      let block = table_entry(p.group, token, (base + i) / 32u);
      let v = two_values(((block * p.n_kv_heads + kv) * 32u + (base + i) % 32u) * $DIM_V + d);
      for (var h = 0u; h < $HEADS; h++) { acc[h] = fma(vec2<f32>(scores[h * 256u + i]), v, acc[h]); }
    }
    for (var h = 0u; h < $HEADS; h++) {
      $STORE
    }
  }
}
$STEP
