// x += scale factor v of one adapter for the tokens that have it.
struct P { width: u32, adapter: u32, x_at: u32, x_row: u32, factor: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = g.x * 64u + t;
  let token = g.y;
  let scale = scale_of($TOKEN, p.adapter);
  if (i >= p.width || scale == 0.0) { return; }
  let to = p.x_at + token * p.x_row + i;
  x[to] = fma(scale * p.factor, v[i], x[to]);
}
$STEP
