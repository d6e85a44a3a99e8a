// $z = a function of $x and $y, value by value; ``per`` neighbours of x have one value of y.
struct P { width: u32, n: u32, per: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, z_at: u32, z_row: u32, amount: f32 }
$BINDINGS
var<immediate> p: P;
$FUNCTIONS
fn f(u: f32, v: f32) -> f32 { return $FUNCTION; }
@compute @workgroup_size($THREADS)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (g.y * ng.x + g.x) * $THREADS + t;
  if (i >= p.n) { return; }
  let row = i / p.width;
  let column = i % p.width;
  $z[p.z_at + row * p.z_row + column] = f($x[p.x_at + row * p.x_row + column], $y[p.y_at + row * p.y_row + column / p.per]);
}
