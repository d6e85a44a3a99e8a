// y += scale factor (B h) of one adapter for the tokens that have it: a thread owns a row.
struct P { words: u32, pieces: u32, first: u32, n: u32, n_out: u32, adapter: u32, ids_at: u32, ids_row: u32, x_at: u32, x_row: u32, x_slot: u32, y_at: u32, y_row: u32, factor: f32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> b: array<u32>;
$MORE
var<immediate> p: P;
$WEIGHTS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let out = g.x * 64u + t;
  let slot = g.y;
  let token = g.z;
  let scale = scale_of($TOKEN, p.adapter);
  if (out >= p.n_out || scale == 0.0) { return; }
  let row = $EXPERT * p.n_out + out - p.first;
  if (row >= p.n) { return; }
  let r = row_base(row);
  let input = p.x_at + token * p.x_row + slot * p.x_slot;
  var sum = 0.0;
  for (var j = 0u; j < p.pieces; j++) {
    let h = head(r, j);
    for (var i = 0u; i < 8u; i++) { sum = mac(sum, quad(r, h, i), four(input + j * 32u + 4u * i)); }
  }
  let to = p.y_at + token * p.y_row + slot * p.n_out + out;
  y[to] = fma(scale * p.factor, sum, y[to]);
}
fn four(at: u32) -> vec4<f32> { return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]); }
$STEP
