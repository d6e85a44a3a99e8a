// z_i = x_i + the sum over j of y[i n + j] x_j, for the $N streams of x: a thread owns a column of all of them.
struct P { width: u32, n: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, z_at: u32, z_row: u32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = (g.y * ng.x + g.x) * 64u + t;
  if (at >= p.n) { return; }
  let row = at / p.width;
  let column = at % p.width;
  var v: array<f32, $N>;
  for (var i = 0u; i < $N; i++) { v[i] = $x[p.x_at + row * p.x_row + i * p.width + column]; }
  for (var i = 0u; i < $N; i++) {
    var sum = v[i];
    for (var j = 0u; j < $N; j++) { sum = fma($y[p.y_at + row * p.y_row + i * $N + j], v[j], sum); }
    $z[p.z_at + row * p.z_row + i * p.width + column] = sum;
  }
}
