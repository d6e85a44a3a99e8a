struct P { width: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = b[b[5] + g.y];
  for (var i = t; i < p.width; i += 64u) { y[p.y_at + g.y * p.y_row + i] = x[p.x_at + row * p.x_row + i]; }
}
