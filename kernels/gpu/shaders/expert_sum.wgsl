struct P { width: u32, n: u32, n_used: u32, x_at: u32, x_row: u32, probs_at: u32, probs_row: u32, y_at: u32, y_row: u32, amount: f32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (g.y * ng.x + g.x) * 64u + t;
  if (i >= p.n) { return; }
  let row = i / p.width;
  let column = i % p.width;
  var sum = 0.0;
  for (var k = 0u; k < p.n_used; k++) {
    sum = fma($probs[p.probs_at + row * p.probs_row + k], $x[p.x_at + row * p.x_row + k * p.width + column], sum);
  }
  let to = p.y_at + row * p.y_row + column;
  $y[to] = $SUM;
}
