// A workgroup takes 16 columns of a head's state through all tokens of a sequence: a thread owns a quarter of a column,
// in registers from the first token to the last, and quarters are added up in their order. So a token has the same bits
// in any chunks. $ROWS: of a quarter. First and second are decay and rate, or what state_gates.wgsl makes them of.
struct P { group: u32, n_k: u32, n_v: u32, tiled: u32, x_at: u32, x_row: u32, first_at: u32, first_row: u32, second_at: u32, second_row: u32, y_at: u32, y_row: u32, eps: f32, scale: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> states: array<f32>;
$BINDINGS
$GATES
$FUNCTIONS
var<immediate> p: P;
const DIM = 4u * $ROWS;
var<workgroup> q: array<f32, DIM>;
var<workgroup> k: array<f32, DIM>;
var<workgroup> part: array<vec2<f32>, 64>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let start = g.z;
  if (b[b[4] + start] != start) { return; }  // it begins with a sequence's first token of this batch
  let head = g.y;
  let key_head = select(head / (p.n_v / p.n_k), head % p.n_k, p.tiled == 1u);
  let column = g.x * 16u + t % 16u;
  let quarter = t / 16u;
  let at = (head * DIM + quarter * $ROWS) * DIM + column;
  let size = p.n_v * DIM * DIM;
  let slot = table_entry(p.group, start, 0u);
  var s: array<f32, $ROWS>;
  for (var i = 0u; i < $ROWS; i++) { s[i] = 0.0; }
  if (slot != 0xffffffffu) { for (var i = 0u; i < $ROWS; i++) { s[i] = states[slot * size + at + i * DIM]; } }
  var token = start;
  loop {
    let row = p.x_at + token * p.x_row;
    var squares = vec2<f32>(0.0);
    for (var d = t; d < DIM; d += 64u) {
      q[d] = $qkv[row + key_head * DIM + d];
      k[d] = $qkv[row + (p.n_k + key_head) * DIM + d];
      squares = fma(vec2<f32>(q[d], k[d]), vec2<f32>(q[d], k[d]), squares);
    }
    let unit = 1.0 / sqrt(totals(squares, t) + p.eps);
    for (var d = t; d < DIM; d += 64u) {
      q[d] *= unit.x;
      k[d] *= unit.y;
    }
    workgroupBarrier();
    let first = $first[p.first_at + token * p.first_row + head];
    let second = $second[p.second_at + token * p.second_row + head];
    let rate = $RATE;
    let decay = $DECAY;
    var sum = 0.0;
    for (var i = 0u; i < $ROWS; i++) {
      s[i] *= decay;
      sum = fma(k[quarter * $ROWS + i], s[i], sum);
    }
    part[t].x = sum;
    workgroupBarrier();
    let lane = t % 16u;
    let recalled = part[lane].x + part[16u + lane].x + part[32u + lane].x + part[48u + lane].x;
    let delta = rate * ($qkv[row + (2u * p.n_k + head) * DIM + column] - recalled);
    sum = 0.0;
    for (var i = 0u; i < $ROWS; i++) {
      s[i] = fma(k[quarter * $ROWS + i], delta, s[i]);
      sum = fma(q[quarter * $ROWS + i], s[i], sum);
    }
    part[t].y = sum;
    workgroupBarrier();
    if (quarter == 0u) {
      let found = part[lane].y + part[16u + lane].y + part[32u + lane].y + part[48u + lane].y;
      $out[p.y_at + token * p.y_row + head * DIM + column] = found * p.scale;
    }
    workgroupBarrier();
    token += 1u;
    if (token >= b[0] || b[b[4] + token] != start) { break; }
  }
  let to = table_entry(p.group, start, 1u);
  for (var i = 0u; i < $ROWS; i++) { states[to * size + at + i * DIM] = s[i]; }
}
$STEP
$TOTALS
