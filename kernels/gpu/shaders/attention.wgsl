// One workgroup: a few query tokens of a sequence, $HEADS query heads that share keys, and 256 positions of the cache.
// These parts lie at fixed positions and are summed in their order, so a token gets the same bits in every batch,
// whatever tokens it shares a workgroup with. A row is a query head of a token.
struct P { group: u32, window: u32, parts: u32, n_heads: u32, n_kv_heads: u32, per_kv: u32, first: u32, end: u32, q_at: u32, q_row: u32, y_at: u32, y_row: u32, scale: f32, cap: f32$GATE_AT }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> values: array<u32>;
$NEWEST
$BINDINGS
var<immediate> p: P;
const NONE = -1e30;
var<workgroup> qs: array<f32, $ROWS * $DIM_K>;
var<workgroup> scores: array<f32, $ROWS * 256u>;
var<workgroup> reduced: array<f32, $ROWS * 64u>;
var<workgroup> tops: array<f32, $ROWS>;  // the largest score
var<workgroup> sums: array<f32, $ROWS>;  // what the values are divided by, behind
var<workgroup> factors: array<f32, $ROWS>;  // what they are multiplied with
var<workgroup> sight: array<vec2<u32>, $QUERIES>;  // the positions that a token sees: the first, and one past the last
$FUNCTIONS
fn capped(score: f32) -> f32 { return softcap(score, p.cap); }
$READERS
fn seen_from(token: u32) -> u32 {
  let end = position_of(token) + 1u;
  return select(0u, end - min(end, p.window), p.window > 0u);
}
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let stop = min(p.first + (g.z + 1u) * $QUERIES, p.end);
  var token = p.first + g.z * $QUERIES;
  loop {  // once for each sequence, and run of packed keys, among its tokens
    var n = 1u;
    for (; n < $QUERIES && token + n < stop && b[b[4] + token + n] == b[b[4] + token]$SAME_RUN; ) { n++; }
    attend(g, t, token, n);
    token += n;
    if (token >= stop) { break; }
    workgroupBarrier();
  }
}
fn attend(g: vec3<u32>, t: u32, token: u32, n: u32) {
  let kv = g.y / p.per_kv;
  let head0 = g.y * $HEADS;
  let base = g.x * 256u;
  let low = seen_from(token);  // of any of the tokens: they stand in the order of their positions
  let high = seen_by(token + n - 1u) + 1u;
  $RUN
  if (base >= high || base + 256u <= low) { return; }
  if (t < $QUERIES) { sight[t] = select(vec2<u32>(0xffffffffu, 0u), vec2<u32>(seen_from(token + t), seen_by(token + t) + 1u), t < n); }
  for (var i = t; i < $ROWS * $DIM_K; i += 64u) {
    let which = min(i / ($HEADS * $DIM_K), n - 1u);
    qs[i] = $q[p.q_at + (token + which) * p.q_row + head0 * $DIM_K + i % ($HEADS * $DIM_K)] * p.scale;
  }
  workgroupBarrier();
  for (var pair = t; pair < 128u; pair += 64u) {
    let i = base + 2u * pair;
    var s: array<vec2<f32>, $ROWS>;
    for (var r = 0u; r < $ROWS; r++) { s[r] = vec2<f32>(0.0); }
    if (i < high && i + 1u >= low) {
      let head = table_entry($GROUP, token, i / 32u) * p.n_kv_heads + kv;
      let o = i % 32u;
      $SCORES
    }
    for (var r = 0u; r < $ROWS; r++) {
      let see = sight[r / $HEADS];
      scores[r * 256u + 2u * pair] = select(NONE, $CAP(s[r].x), i >= see.x && i < see.y);
      scores[r * 256u + 2u * pair + 1u] = select(NONE, $CAP(s[r].y), i + 1u >= see.x && i + 1u < see.y);
    }
  }
  workgroupBarrier();
  for (var r = 0u; r < $ROWS; r++) {
    var most = NONE;
    for (var i = t; i < 256u; i += 64u) { most = max(most, scores[r * 256u + i]); }
    reduced[r * 64u + t] = most;
  }
  workgroupBarrier();
  for (var i = t; i < $ROWS * 8u; i += 64u) {  // a tree over 64 in two halves, as in tree.wgsl
    let at = i / 8u * 64u + i % 8u;
    reduced[at] = $LARGEST_UPPER;
  }
  workgroupBarrier();
  if (t < $ROWS) {
    let at = t * 64u;
    tops[t] = $LARGEST_LOWER;
  }
  workgroupBarrier();
  for (var r = 0u; r < $ROWS; r++) {
    var sum = 0.0;
    for (var i = t; i < 256u; i += 64u) {
      let e = select(exp(scores[r * 256u + i] - tops[r]), 0.0, scores[r * 256u + i] == NONE);
      scores[r * 256u + i] = e;
      sum += e;
    }
    reduced[r * 64u + t] = sum;
  }
  workgroupBarrier();
  for (var i = t; i < $ROWS * 8u; i += 64u) {
    let at = i / 8u * 64u + i % 8u;
    reduced[at] = $SUM_UPPER;
  }
  workgroupBarrier();
  if (t < $HEADS * n) {
      let at = t * 64u;
      let sum = $SUM_LOWER;
      $KEEP_SUM
  }
  workgroupBarrier();
  let begin = max(low, base);
  let end = min(high, base + 256u);
  let all_from = max(seen_from(token + n - 1u), base);  // positions that every token sees
  let all_end = min(seen_by(token) + 1u, end);
  let own = t / $LANES * $OWN;  // the first of the rows that a thread sums up, for two dimensions at a time
  for (var d = 2u * (t % $LANES); d < $DIM_V; d += 2u * $LANES) {
    var acc: array<vec2<f32>, $OWN>;
    for (var k = 0u; k < $OWN; k++) { acc[k] = vec2<f32>(0.0); }
    for (var i = begin; i < end; ) {
      let head = table_entry($GROUP, token, i / 32u) * p.n_kv_heads + kv;
      let last = min(end, (i / 32u + 1u) * 32u);
      for (; i < last; i++) {
        let v = $VALUE;
        if (i >= all_from && i < all_end) {
          for (var k = 0u; k < $OWN; k++) { acc[k] = fma(vec2<f32>(scores[(own + k) * 256u + i - base]), v, acc[k]); }
        } else {
          for (var k = 0u; k < $OWN; k++) {  // what a token must not see may be no number
            let e = scores[(own + k) * 256u + i - base];
            if (e != 0.0) { acc[k] = fma(vec2<f32>(e), v, acc[k]); }
          }
        }
      }
    }
    for (var k = 0u; k < $OWN; k++) {
      let r = own + k;
      if (r < $HEADS * n) {
          $STORE
      }
    }
  }
}
$STEP
