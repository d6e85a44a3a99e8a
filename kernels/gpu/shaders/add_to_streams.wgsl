// z_i = x_i + a factor of the stream times y, for the streams of x from ``first`` on; the others are left as they are.
struct P { width: u32, stream: u32, first: u32, n: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, c_at: u32, c_row: u32, z_at: u32, z_row: u32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = (g.y * ng.x + g.x) * 64u + t;
  if (at >= p.n) { return; }
  let row = at / p.width;
  let column = at % p.width;
  let i = column / p.stream;
  var value = $x[p.x_at + row * p.x_row + column];
  if (i >= p.first) { value = fma($FACTOR, $y[p.y_at + row * p.y_row + column % p.stream], value); }
  $z[p.z_at + row * p.z_row + column] = value;
}
