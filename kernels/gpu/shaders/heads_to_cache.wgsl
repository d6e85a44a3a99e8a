// A workgroup for each head of a token: queries and keys are normed where the model does so, as in rms_norm.wgsl, before
// or behind their rotation as in rope.wgsl, each head or a row as a whole, which then stays as it was for others to read; keys and values, which may be normed, too, go to store_kv.wgsl's place.
struct P { heads: u32, kv_heads: u32, dim_k: u32, dim_v: u32, half: u32, adjacent: u32, rope: u32, rope_k: u32, group: u32, q_at: u32, q_row: u32, y_at: u32, y_row: u32, k_at: u32, k_row: u32, v_at: u32, v_row: u32, eps: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> keys: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> values: array<atomic<u32>>;
$BINDINGS
var<immediate> p: P;
$PUT
$TOTAL
$ROTATE
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let token = g.y;
  let at = position_of(token);
  let block = table_entry(p.group, token, at / 32u);
  let o = at % 32u;
  if (g.x >= p.heads + p.kv_heads) {
    let kv = g.x - p.heads - p.kv_heads;
    let value = p.v_at + token * p.v_row + kv * p.dim_v;
    $NORM_VALUES
    for (var d = t; d < p.dim_v; d += 64u) {
      let e = ((block * p.kv_heads + kv) * 32u + o) * p.dim_v + d;
      put_values(e, $v[value + d]$FACTOR);
    }
    return;
  }
  let is_key = g.x >= p.heads;
  let kv = g.x - p.heads;
  let begin = p.q_at + token * p.q_row + g.x * p.dim_k;
  let key_begin = p.k_at + token * p.k_row + kv * p.dim_k;
  for (var d = t; d < p.dim_k; d += 64u) { if (is_key) { head[d] = $k[key_begin + d]; } else { head[d] = $q[begin + d]; } }
  $NORM
  workgroupBarrier();
  rotate(token, select(p.rope, p.rope_k, is_key), t);
  workgroupBarrier();
  $NORM_BEHIND
  if (!is_key) {
    let y = p.y_at + token * p.y_row + g.x * p.dim_k;
    for (var d = t; d < p.dim_k; d += 64u) { $y[y + d] = head[d]; }
    return;
  }
  for (var d = t; d < p.dim_k; d += 64u) {
    put_keys(((block * p.kv_heads + kv) * p.dim_k + d) * 32u + o, head[d]);
  }
}
$STEP
