// Keys or values in fewer bits: a thread fits a group of 32 dimensions of a token. ``nothing`` is 0: what a driver does
// not know keeps it from making one fma of a product and a sum, which would round otherwise.
struct P { heads: u32, dim: u32, group: u32, x_at: u32, x_row: u32, nothing: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> kept: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
var<immediate> p: P;
$HALF_BITS
$LEVELS
$NEAREST
fn apart(v: f32) -> f32 { return bitcast<f32>(bitcast<u32>(v) ^ p.nothing); }
fn reciprocal(d: f32) -> f32 { if (d == 0.0) { return 0.0; } return 1.0 / d; }
fn nearest(v: f32) -> u32 {  // a signed byte, halves away start zero
  let whole = trunc(v);
  return u32(i32(whole + select(0.0, sign(v), abs(v - whole) >= 0.5))) & 0xffu;
}
fn put(base: u32, at: u32, mask: u32, bits: u32) {
  let shift = 8u * (at & 3u);
  atomicAnd(&kept[base + at / 4u], ~(mask << shift));
  atomicOr(&kept[base + at / 4u], bits << shift);
}
fn put_nibble(base: u32, at: u32, high: u32, bits: u32) { put(base, at, 15u << (4u * high), bits << (4u * high)); }
fn put_half(base: u32, i: u32, bits: u32) {
  atomicAnd(&kept[base + i / 2u], ~(0xffffu << (16u * (i & 1u))));
  atomicOr(&kept[base + i / 2u], bits << (16u * (i & 1u)));
}
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = g.x * 64u + t;
  if (i >= p.heads * (p.dim / 32u)) { return; }
  let position = position_of(g.y);
  let o = position % 32u;
  let base = (table_entry(p.group, g.y, position / 32u) * p.heads + i / (p.dim / 32u)) * $WORDS;
  let start = p.x_at + g.y * p.x_row + i * 32u;
  var largest = x[start];  // the first with the largest magnitude
  var low = largest;
  var high = largest;
  var not_finite = false;
  for (var k = 0u; k < 32u; k++) {
    let v = x[start + k];
    not_finite = not_finite || (bitcast<u32>(v) & 0x7f800000u) == 0x7f800000u;
    if (abs(v) > abs(largest)) { largest = v; }
    low = min(low, v);
    high = max(high, v);
  }
  let magnitude = abs(largest);
  var m = 0.0;
  $FIT
  for (var k = 0u; k < 32u; k++) {
    let d = i % (p.dim / 32u) * 32u + k;
    let v = x[start + k];
    let code = $CODE;
    let dot = $DOT;
    let lane = $LANE;
    $PUT
  }
  put_half(base + $SCALES, i % (p.dim / 32u) * 32u + o, select(half_bits(d), 0x7e00u, not_finite));
  $MINIMUM
}
$STEP
