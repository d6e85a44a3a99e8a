// rope.wgsl over queries, and over keys on their way to store_kv.wgsl's place: a thread for each pair of a query, for each
// number of a key, and for each of a value.
struct P { heads: u32, kv_heads: u32, dim_k: u32, dim_v: u32, half: u32, adjacent: u32, rope: u32, group: u32, q_at: u32, k_at: u32, q_row: u32, v_at: u32, v_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> keys: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> values: array<atomic<u32>>;
$BINDINGS
var<immediate> p: P;
$HALF_BITS
fn rotated(head: u32, d: u32, token: u32) -> vec2<f32> {  // the pair d of a head
  let angle = b[32u + p.rope] + token * 2u * p.half + d;
  let c = bitcast<f32>(b[angle]);
  let s = bitcast<f32>(b[angle + p.half]);
  let u = $q[head + select(d, 2u * d, p.adjacent == 1u)];
  let v = $q[head + select(d + p.half, 2u * d + 1u, p.adjacent == 1u)];
  return vec2<f32>(fma(u, c, -(v * s)), fma(v, c, u * s));
}
fn key_of(head: u32, d: u32, token: u32) -> f32 {
  if (d >= 2u * p.half) { return $q[head + d]; }
  if (p.adjacent == 1u) {
    let pair = rotated(head, d / 2u, token);
    return select(pair.x, pair.y, (d & 1u) == 1u);
  }
  let pair = rotated(head, d % p.half, token);
  return select(pair.x, pair.y, d >= p.half);
}
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let token = g.y;
  let at = position_of(token);
  let block = table_entry(p.group, token, at / 32u);
  let o = at % 32u;
  var i = g.x * 64u + t;
  if (i < p.heads * p.half) {
    let d = i % p.half;
    let head = p.q_at + token * p.q_row + (i / p.half) * p.dim_k;
    let pair = rotated(head, d, token);
    $q[head + select(d, 2u * d, p.adjacent == 1u)] = pair.x;
    $q[head + select(d + p.half, 2u * d + 1u, p.adjacent == 1u)] = pair.y;
    return;
  }
  i -= p.heads * p.half;
  if (i < p.kv_heads * p.dim_k) {
    let value = key_of(p.k_at + token * p.q_row + (i / p.dim_k) * p.dim_k, i % p.dim_k, token);
    let e = (block * p.kv_heads * p.dim_k + i) * 32u + o;
    let shift = 16u * (e & 1u);
    atomicAnd(&keys[e / 2u], ~(0xffffu << shift));
    atomicOr(&keys[e / 2u], half_bits(value) << shift);
    return;
  }
  i -= p.kv_heads * p.dim_k;
  if (i < p.kv_heads * p.dim_v) {
    let e = ((block * p.kv_heads + i / p.dim_v) * 32u + o) * p.dim_v + i % p.dim_v;
    let shift = 16u * (e & 1u);
    atomicAnd(&values[e / 2u], ~(0xffffu << shift));
    atomicOr(&values[e / 2u], half_bits($v[p.v_at + token * p.v_row + i]) << shift);
  }
}
$STEP
