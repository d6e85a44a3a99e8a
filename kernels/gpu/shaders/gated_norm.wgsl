// x silu(gate), normed over each group of a row.
struct P { width: u32, x_at: u32, x_row: u32, gate_at: u32, gate_row: u32, y_at: u32, y_row: u32, eps: f32 }
@group(0) @binding(0) var<storage, read> w: array<f32>;
$BINDINGS
var<immediate> p: P;
$FUNCTIONS
fn value(row: u32, i: u32) -> f32 { return silu($gate[p.gate_at + row * p.gate_row + i], $x[p.x_at + row * p.x_row + i]); }
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = g.x * p.width;
  var sum = 0.0;
  for (var i = t; i < p.width; i += 64u) { let v = value(g.y, begin + i); sum = fma(v, v, sum); }
  let factor = 1.0 / sqrt(total(sum, t) / f32(p.width) + p.eps);
  for (var i = t; i < p.width; i += 64u) {
    $y[p.y_at + g.y * p.y_row + begin + i] = value(g.y, begin + i) * factor * w[begin + i];
  }
}
$TOTAL
