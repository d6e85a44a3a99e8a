// A workgroup brings a stream of x to the length of y.
struct P { width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, z_at: u32, z_row: u32, least: f32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.y * p.x_row + g.x * p.width;
  var sum = vec2<f32>(0.0);
  for (var i = t; i < p.width; i += 64u) {
    let v = vec2<f32>($y[p.y_at + g.y * p.y_row + i], $x[begin + i]);
    sum = fma(v, v, sum);
  }
  let mean = totals(sum, t) / f32(p.width);
  let factor = sqrt(mean.x / max(mean.y, p.least));
  for (var i = t; i < p.width; i += 64u) { $z[p.z_at + g.y * p.z_row + g.x * p.width + i] = $x[begin + i] * factor; }
}
$TOTALS
