// Heads of a buffer, each [first | second], from or to heads of two.
struct P { width: u32, n: u32, dim: u32, whole: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, z_at: u32, z_row: u32 }
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (g.y * ng.x + g.x) * 64u + t;
  if (i >= p.n) { return; }
  let row = i / p.width;
  let head = i % p.width / p.whole;
  let at = i % p.whole;
  let x = p.x_at + row * p.x_row + i % p.width;
  let y = p.y_at + row * p.y_row + head * p.dim + at;
  let z = p.z_at + row * p.z_row + head * (p.whole - p.dim) + at - p.dim;
  if (at < p.dim) { $FIRST; } else { $SECOND; }
}
