// y[token, head] = x[token, head] times rows of a weight, each a row of the head's matrix on its side: a thread owns four
// columns and adds the rows up in their order.
struct P { words: u32, pieces: u32, first: u32, n: u32, of_one: u32, begin: u32, n_rows: u32, width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
var<immediate> p: P;
$WEIGHTS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let q = g.x * 64u + t;
  if (q >= p.pieces * 8u) { return; }
  let to = p.y_at + g.z * p.y_row + g.y * p.width + 4u * q;
  var sum = vec4<f32>(0.0);
  for (var i = 0u; i < 4u; i++) { if (p.first > 0u && 4u * q + i < p.width) { sum[i] = y[to + i]; } }
  for (var i = 0u; i < p.n_rows; i++) {
    let row = g.y * p.of_one + p.begin + i - p.first;
    if (row < p.n) {
      let r = row_base(row);
      let v = quad(r, head(r, q >> 3u), q & 7u);
      sum = fma(vec4<f32>(x[p.x_at + g.z * p.x_row + g.y * p.n_rows + i]), v, sum);
    }
  }
  for (var i = 0u; i < 4u; i++) { if (4u * q + i < p.width) { y[to + i] = sum[i]; } }
}
