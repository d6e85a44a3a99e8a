// h = A x of one adapter for the tokens that have it, zeros for those that have not, and behind the rank up to ``span``.
struct P { words: u32, pieces: u32, first: u32, n: u32, rank: u32, span: u32, adapter: u32, ids_at: u32, ids_row: u32, x_at: u32, x_row: u32, x_slot: u32, y_at: u32, y_row: u32, y_slot: u32 }
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> b: array<u32>;
$MORE
var<immediate> p: P;
var<workgroup> part: array<f32, $SLICES * $LANES>;
$WEIGHTS
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % $LANES;
  let slice = t / $LANES;
  let slot = g.y;
  let token = g.z;
  let out = g.x * $LANES + lane;
  let row = $EXPERT * p.rank + min(out, p.rank - 1u) - p.first;
  let mine = row < p.n;
  let to = p.y_at + token * p.y_row + slot * p.y_slot + out;
  if (scale_of($TOKEN, p.adapter) == 0.0) {
    if (slice == 0u && mine && out < p.span) { y[to] = 0.0; }
    return;
  }
  let r = row_base(select(0u, row, mine));
  let per = (p.pieces + $SLICES - 1u) / $SLICES;
  let input = p.x_at + token * p.x_row + slot * p.x_slot;
  var sum = 0.0;
  for (var j = slice * per; j < min((slice + 1u) * per, p.pieces); j++) {
    let h = head(r, j);
    for (var i = 0u; i < 8u; i++) { sum = mac(sum, quad(r, h, i), four(input + j * 32u + 4u * i)); }
  }
  part[t] = sum;
  workgroupBarrier();
  if (slice == 0u && mine && out < p.span) {
    sum = 0.0;
    for (var i = 0u; i < $SLICES; i++) { sum += part[i * $LANES + lane]; }
    y[to] = select(0.0, sum, out < p.rank);
  }
}
fn four(at: u32) -> vec4<f32> { return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]); }
$STEP
