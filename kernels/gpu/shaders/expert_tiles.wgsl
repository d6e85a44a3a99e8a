// The same for many tokens: matmul_tiles.wgsl, whose columns are tokens that were sent to one expert, or all tokens of
// one head.
struct P { words: u32, pieces: u32, first: u32, n: u32, of_one: u32, begin: u32, n_out: u32, n_used: u32, m: u32, x_at: u32, x_row: u32, x_slot: u32, y_at: u32, y_row: u32, y_slot: u32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$MORE
var<immediate> p: P;
var<workgroup> ws: array<vec4<f32>, 64u * 9u>;
var<workgroup> xs: array<vec4<f32>, 32u * 9u>;
var<workgroup> inputs: array<u32, 32>;  // where a column begins in x
var<workgroup> outputs: array<u32, 32>;  // and in y
$WEIGHTS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  $TILE
  if (t < 32u) {
    let c = min(t, n_columns - 1u);
    $PAIR
    inputs[t] = p.x_at + token * p.x_row + slot * p.x_slot;
    outputs[t] = p.y_at + token * p.y_row + slot * p.y_slot;
  }
  workgroupBarrier();
  let tx = t & 7u;
  let ty = t >> 3u;
  let of_expert = expert * p.of_one + p.begin - p.first;
  let mine = of_expert + min(g.x * 64u + t, p.n_out - 1u);
  let r = row_base(select(0u, mine, mine < p.n));
  $TILE_SUMS
  for (var a = 0u; a < 8u; a++) {
    for (var c = 0u; c < 4u; c++) {
      let out = g.x * 64u + tx + 8u * a;
      let column = ty + 8u * c;
      if (out < p.n_out && of_expert + out < p.n && column < n_columns) {
        let sum = sum[a * 4u + c];
        y[outputs[column] + out] = $SUM;
      }
    }
  }
}
