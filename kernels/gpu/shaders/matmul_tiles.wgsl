// y = W x for many columns: 64 rows by 32 columns a workgroup, 8 by 4 a thread, 32 weights deep at a time; the sums of
// matmul.wgsl's slices are added up in its order.
struct P { words: u32, pieces: u32, begin: u32, end: u32, m: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, bias_at: u32, amount: f32$FIELDS }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$BIAS
var<immediate> p: P;
var<workgroup> ws: array<vec4<f32>, 64u * 9u>;  // 9: a column of threads finds its rows in different banks
var<workgroup> xs: array<vec4<f32>, 32u * 9u>;
$WEIGHTS
$FUNCTIONS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let r0 = p.begin + (g.y * ng.x + g.x) * 64u;
  let c0 = g.z * 32u;
  let tx = t & 7u;
  let ty = t >> 3u;
  let bias_at = p.bias_at;
  let r = row_base(min(r0 + t, p.end - 1u));
  $TILE_SUMS
  for (var a = 0u; a < 8u; a++) {
    for (var c = 0u; c < 4u; c++) {
      let row = r0 + tx + 8u * a;
      let column = c0 + ty + 8u * c;
      if (row < p.end && column < p.m) {
        let to = p.y_at + column * p.y_row + row;
        let sum = sum[a * 4u + c];
        $STORE
      }
    }
  }
}
