// y[token, slot] = W[of slot] x, or activation(G[of slot] x) * (U[of slot] x): matmul.wgsl for one column, whose rows are
// those of an expert, or of a head. The expert may be chosen here, by every workgroup for itself; then the first one of a
// token writes down which there are. The slots behind those of experts may be rows of another matrix, of any type, that
// all tokens share, with a gate as those of the experts.
struct P { words: u32, pieces: u32, first: u32, n: u32, of_one: u32, begin: u32, n_out: u32, ids_at: u32, ids_row: u32, x_at: u32, x_row: u32, x_slot: u32, y_at: u32, y_row: u32, y_slot: u32$APART$FIELDS }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$MORE
var<immediate> p: P;
var<workgroup> part: array<$TYPE, $SLICES * $LANES>;
$WEIGHTS
$FUNCTIONS
$ROUTING
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % $LANES;
  let slice = t / $LANES;
  let slot = g.y;
  let token = g.z;
  let out = g.x * $LANES + lane;
  $SHARED
  // of a part of the experts, such as one binding can hold, whose first row is ``first`` of all experts' rows
  let row = $EXPERT * p.of_one + p.begin + min(out, p.n_out - 1u) - p.first;
  let mine = row < p.n;
  let own = select(0u, row, mine);
  let per = (p.pieces + $SLICES - 1u) / $SLICES;
  let input = p.x_at + token * p.x_row + slot * p.x_slot;
  $START
  $SUMS
  $KEEP
  workgroupBarrier();
  if (slice == 0u && mine && out < p.n_out) {
    var sum = $TYPE();
    for (var i = 0u; i < $SLICES; i++) { sum += part[i * $LANES + lane]; }
    y[p.y_at + token * p.y_row + slot * p.y_slot + out] = $SUM;
  }
}
