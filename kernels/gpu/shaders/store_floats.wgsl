// Keys, values, or both in one, as floats: those of 16 bits are two in a word, which two tokens of a batch may share.
struct P { heads: u32, dim: u32, group: u32, x_at: u32, x_row: u32, nothing: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> kept: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read> rows: array<f32>;
var<immediate> p: P;
$HALF_BITS
fn bfloat_bits(x: f32) -> u32 {  // nearest, ties to even
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return (bits >> 16u) | 0x40u; }
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = g.x * 64u + t;
  if (i >= p.heads * p.dim) { return; }
  let at = position_of(g.y);
  let head = table_entry(p.group, g.y, at / 32u) * p.heads + i / p.dim;
  let o = at % 32u;
  let d = i % p.dim;
  let x = rows[p.x_at + g.y * p.x_row + i];
  let e = $PLACE;
  $WRITE
}
$STEP
