// Each group of a row is normed; its values may go through a gate.
struct P { width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, eps: f32$GATE_AT }
@group(0) @binding(0) var<storage, read> w: array<f32>;
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.y * p.x_row + g.x * p.width;
  let to = p.y_at + g.y * p.y_row + g.x * p.width;
  var sum = 0.0;
  for (var i = t; i < p.width; i += 64u) { let v = $x[begin + i]; sum = fma(v, v, sum); }
  let factor = 1.0 / sqrt(total(sum, t) / f32(p.width) + p.eps);
  for (var i = t; i < p.width; i += 64u) {
    let v = $x[begin + i] * factor * w[i];
    $y[to + i] = $VALUE;
  }
}
$TOTAL
$FUNCTIONS
