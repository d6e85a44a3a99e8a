// y = W x for at most $COLS columns: a thread owns a row and a slice of its weights, so nothing is summed across a
// subgroup, and the order of additions is the same for every number of columns (matmul_tiles.wgsl has it, too). Or
// y = activation(G x) * (U x): a thread has a row of each, whose rows stand in one matrix, U's ``apart`` behind those of G.
// x may be normed first, by every workgroup for itself. Other matrices, of any type, may have the workgroups from a
// ``split`` on, with an input or an output of their own.
struct P { words: u32, pieces: u32, begin: u32, end: u32, m: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, bias_at: u32, amount: f32$APART$FIELDS }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$BIAS
var<immediate> p: P;
var<workgroup> part: array<$TYPE, $SLICES * $LANES * $COLS>;
$WEIGHTS
$OTHERS
$FUNCTIONS
$NORM
$CONV
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % $LANES;
  let slice = t / $LANES;
  let group = g.y * ng.x + g.x;
  $ROWS
  let own = min(row, end - 1u);
  let per = (p.pieces + $SLICES - 1u) / $SLICES;
  $NORMED
  $START
  $SUMS
  $KEEP
  workgroupBarrier();
  for (var c = slice; c < $COLS; c += $SLICES) {
    var sum = $TYPE();
    for (var i = 0u; i < $SLICES; i++) { sum += part[(c * $SLICES + i) * $LANES + lane]; }
    if (row < end && c < p.m) {
      let to = y_at + c * p.y_row + row;
      $STORE
    }
  }
}
