// A workgroup takes 16 columns of a head's state, (state size, head dimension), through all tokens of a sequence: a
// thread owns a quarter of a column, in registers from the first token to the last, and quarters are added up in their
// order. So a token has the same bits in any chunks. $ROWS: of a quarter; those behind the last of $SIZE stay zero.
// First and second are decay and rate, or what state_gates.wgsl makes them of. What is made may go through a gate.
struct P { group: u32, n_heads: u32, n_groups: u32, inner: u32, x_at: u32, x_row: u32, first_at: u32, first_row: u32, second_at: u32, second_row: u32, y_at: u32, y_row: u32$FIELDS }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> states: array<f32>;
@group(0) @binding(2) var<storage, read> own: array<f32>;
$BINDINGS
$GATES
$FUNCTIONS
var<immediate> p: P;
var<workgroup> taken: array<f32, 4u * $ROWS>;
var<workgroup> asked: array<f32, 4u * $ROWS>;
var<workgroup> part: array<f32, 64>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let start = g.z;
  if (b[b[4] + start] != start) { return; }  // it begins with a sequence's first token of this batch
  let head = g.y;
  let lane = t % 16u;
  let quarter = t / 16u;
  let is_there = g.x * 16u + lane < $DIM;
  let column = min(g.x * 16u + lane, $DIM - 1u);
  let at = (head * $SIZE + quarter * $ROWS) * $DIM + column;
  let n_rows = min($SIZE - min($SIZE, quarter * $ROWS), $ROWS);
  let size = p.n_heads * $SIZE * $DIM;
  let slot = table_entry(p.group, start, 0u);
  var s: array<f32, $ROWS>;
  for (var i = 0u; i < $ROWS; i++) { s[i] = 0.0; }
  if (slot != 0xffffffffu) {
    for (var i = 0u; i < $ROWS; i++) { if (i < n_rows) { s[i] = states[slot * size + at + i * $DIM]; } }
  }
  var token = start;
  loop {
    let row = p.x_at + token * p.x_row;
    let of_group = row + p.inner + head / (p.n_heads / p.n_groups) * $SIZE;
    for (var i = t; i < 4u * $ROWS; i += 64u) {
      taken[i] = 0.0;
      asked[i] = 0.0;
      if (i < $SIZE) {
        taken[i] = $xbc[of_group + i];
        asked[i] = $xbc[of_group + p.n_groups * $SIZE + i];
      }
    }
    workgroupBarrier();
    let first = $first[p.first_at + token * p.first_row + head];
    let second = $second[p.second_at + token * p.second_row + head];
    let rate = $RATE;
    let decay = $DECAY;
    let x = $xbc[row + head * $DIM + column];
    let input = rate * x;
    var sum = 0.0;
    for (var i = 0u; i < $ROWS; i++) {
      s[i] = fma(taken[quarter * $ROWS + i], input, s[i] * decay);
      sum = fma(asked[quarter * $ROWS + i], s[i], sum);
    }
    part[t] = sum;
    workgroupBarrier();
    if (quarter == 0u && is_there) {
      let found = part[lane] + part[16u + lane] + part[32u + lane] + part[48u + lane];
      let at_column = head * $DIM + column;
      let made = fma(own[head], x, found);
      $out[p.y_at + token * p.y_row + at_column] = $VALUE;
    }
    workgroupBarrier();
    token += 1u;
    if (token >= b[0] || b[b[4] + token] != start) { break; }
  }
  if (!is_there) { return; }
  let to = table_entry(p.group, start, 1u);
  for (var i = 0u; i < $ROWS; i++) { if (i < n_rows) { states[to * size + at + i * $DIM] = s[i]; } }
}
$STEP
