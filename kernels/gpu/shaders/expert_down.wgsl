// y[token] = the sum over its experts of what each counts times W[of the expert] x[slot], or a multiple of it is added to y:
// expert_matmul.wgsl and expert_sum.wgsl in one, with their orders of additions. Then what another matrix, of any type,
// makes of another input may be added, by a gate: an expert that all tokens share.
struct P { words: u32, pieces: u32, of_one: u32, begin: u32, n_out: u32, ids_at: u32, ids_row: u32, x_at: u32, x_row: u32, x_slot: u32, probs_at: u32, probs_row: u32, y_at: u32, y_row: u32, amount: f32$FIELDS }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> ids: array<u32>;
@group(0) @binding(4) var<storage, read> probs: array<f32>;$MORE
var<immediate> p: P;
var<workgroup> part: array<f32, $N_SLOTS * $SLICES * $LANES>;
$WEIGHTS
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % $LANES;
  let slice = t / $LANES;
  let token = g.z;
  let out = g.x * $LANES + lane;
  let row = min(out, p.n_out - 1u);
  let chosen = p.ids_at + token * p.ids_row;
  let per = (p.pieces + $SLICES - 1u) / $SLICES;
  for (var slot = 0u; slot < $N_USED; slot++) {
    let own = ids[chosen + slot] * p.of_one + p.begin + row;
    let input = p.x_at + token * p.x_row + slot * p.x_slot;
    $START
    $SUMS
    $KEEP
  }
  $SHARED
  workgroupBarrier();
  if (slice < $N_SLOTS) {  // a slice of threads adds up one expert's
    var sum = 0.0;
    for (var i = 0u; i < $SLICES; i++) { sum += part[(slice * $SLICES + i) * $LANES + lane]; }
    part[slice * $SLICES * $LANES + lane] = $SUM;
  }
  workgroupBarrier();
  if (slice == 0u && out < p.n_out) {
    var sum = 0.0;
    for (var k = 0u; k < $N_USED; k++) { sum = fma(probs[p.probs_at + token * p.probs_row + k], part[k * $SLICES * $LANES + lane], sum); }
    $ADD
    let to = p.y_at + token * p.y_row + out;
    y[to] = $STORE;
  }
}
