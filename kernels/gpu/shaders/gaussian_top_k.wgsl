// What of a row is beyond its mean and some deviations, less that.
struct P { width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, factor: f32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.y * p.x_row;
  var sum = 0.0;
  for (var i = t; i < p.width; i += 64u) { sum += $x[begin + i]; }
  let mean = total(sum, t) / f32(p.width);
  sum = 0.0;
  for (var i = t; i < p.width; i += 64u) { let v = $x[begin + i] - mean; sum = fma(v, v, sum); }
  let cutoff = fma(p.factor, sqrt(total(sum, t) / f32(p.width)), mean);
  for (var i = t; i < p.width; i += 64u) { $y[p.y_at + g.y * p.y_row + i] = max($x[begin + i] - cutoff, 0.0); }
}
$TOTAL
