// y = activation(G x) * (U x) for at most $COLS columns: matmul.wgsl with a row of each of two matrices a thread, whose rows
// stand in one, those of U ``apart`` rows behind those of G.
struct P { words: u32, pieces: u32, begin: u32, end: u32, apart: u32, m: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
var<immediate> p: P;
var<workgroup> part: array<vec2<f32>, $SLICES * $LANES * $COLS>;
$WEIGHTS
$FUNCTIONS
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % $LANES;
  let slice = t / $LANES;
  let row = p.begin + (g.y * ng.x + g.x) * $LANES + lane;
  let r = row_base(min(row, p.end - 1u));
  let up = row_base(min(row, p.end - 1u) + p.apart);
  let per = (p.pieces + $SLICES - 1u) / $SLICES;
  $START
  for (var j = slice * per; j < min((slice + 1u) * per, p.pieces); j++) {
    let h = head(r, j);
    let k = head(up, j);
    $PRODUCTS
  }
  $KEEP
  workgroupBarrier();
  for (var c = slice; c < $COLS; c += $SLICES) {
    var sum = vec2<f32>(0.0);
    for (var i = 0u; i < $SLICES; i++) { sum += part[(c * $SLICES + i) * $LANES + lane]; }
    if (row < p.end && c < p.m) { y[p.y_at + c * p.y_row + row] = $ACTIVATION(sum.x, sum.y); }
  }
}
