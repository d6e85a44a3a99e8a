// A row of a table by a token's position or type, added to its own.
struct P { words: u32, pieces: u32, first: u32, n: u32, width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> b: array<u32>;
$BINDINGS
var<immediate> p: P;
$WEIGHTS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = $NUMBER - p.first;  // a tensor beyond the limit of bindings comes in parts
  if (row >= p.n) { return; }
  let r = row_base(row);
  for (var q = t; q < p.pieces * 8u; q += 64u) {
    let h = head(r, q >> 3u);
    let v = quad(r, h, q & 7u);
    let begin = p.x_at + g.x * p.x_row + 4u * q;
    let to = p.y_at + g.x * p.y_row + 4u * q;
    for (var i = 0u; i < 4u; i++) { if (4u * q + i < p.width) { $y[to + i] = $x[begin + i] + v[i]; } }
  }
}
$STEP
