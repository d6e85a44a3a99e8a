struct P { heads: u32, head_dim: u32, half: u32, adjacent: u32, rope: u32, x_at: u32, x_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = g.x * 64u + t;
  if (i >= p.heads * p.half) { return; }
  let d = i % p.half;
  let head = p.x_at + g.y * p.x_row + (i / p.half) * p.head_dim;
  let first = head + select(d, 2u * d, p.adjacent == 1u);
  let second = head + select(d + p.half, 2u * d + 1u, p.adjacent == 1u);
  let angle = b[32u + p.rope] + g.y * 2u * p.half + d;
  let c = bitcast<f32>(b[angle]);
  let s = bitcast<f32>(b[angle + p.half]);
  let u = x[first];
  let v = x[second];
  x[first] = fma(u, c, -(v * s));
  x[second] = fma(v, c, u * s);
}
