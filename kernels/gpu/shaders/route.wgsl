// The n_used best experts of a row, the first of equals first, and their weights. They are chosen by the logits, or by
// scores: the softmax of the logits or the sigmoid of each, to which a bias may be added, of the best groups alone.
struct P { n_used: u32, groups: u32, groups_used: u32, best: u32, over_all: u32, x_at: u32, x_row: u32, ids_at: u32, ids_row: u32, y_at: u32, y_row: u32, factor: f32 }
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$VECTORS
var<immediate> p: P;
var<workgroup> choice: array<u32, $N>;  // keys of what experts are chosen by; 0 is below all of them
var<workgroup> of_group: array<f32, $N>;
$KEYS
fn before(u: vec2<u32>, v: vec2<u32>) -> bool { return u.x > v.x || (u.x == v.x && u.y < v.y); }
fn earlier(u: vec2<u32>, v: vec2<u32>) -> vec2<u32> { return select(u, v, before(v, u)); }
$FIRST_OF
$LARGEST_OF
$TOTAL
fn logistic(v: f32) -> f32 { return 1.0 / (1.0 + exp(-max(v, -80.0))); }
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.x * p.x_row;
  var largest = -3.4e38;
  for (var i = t; i < $N; i += 64u) { largest = max(largest, x[begin + i]); }
  largest = largest_of(largest, t);
  var sum = 0.0;
  for (var i = t; i < $N; i += 64u) { sum += exp(x[begin + i] - largest); }
  let whole = total(sum, t);
  for (var i = t; i < $N; i += 64u) { choice[i] = key(bitcast<u32>($SCORE$BIASED)); }
  workgroupBarrier();
  if (p.groups > 1u) {
    let size = $N / p.groups;
    for (var i = t; i < p.groups; i += 64u) {
      var first = 0u;
      var second = 0u;
      for (var k = i * size; k < (i + 1u) * size; k++) {
        if (choice[k] > first) { second = first; first = choice[k]; } else { second = max(second, choice[k]); }
      }
      of_group[i] = bitcast<f32>(unkey(first));
      if (p.best > 1u && size > 1u) { of_group[i] += bitcast<f32>(unkey(second)); }
    }
    workgroupBarrier();
    for (var i = t; i < $N; i += 64u) {
      let mine = i / size;
      var rank = 0u;
      for (var k = 0u; k < p.groups; k++) {
        if (of_group[k] > of_group[mine] || (of_group[k] == of_group[mine] && k < mine)) { rank += 1u; }
      }
      if (rank >= p.groups_used) { choice[i] = 0u; }
    }
    workgroupBarrier();
  }
  var last = vec2<u32>(0xffffffffu, 0u);
  sum = 0.0;
  for (var k = 0u; k < p.n_used; k++) {
    var mine = vec2<u32>(0u, 0xffffffffu);
    for (var i = t; i < $N; i += 64u) {
      let one = vec2<u32>(choice[i], i);
      if ((k == 0u || before(last, one)) && before(one, mine)) { mine = one; }
    }
    last = first_of(mine, t);
    let i = min(last.y, $N - 1u);
    let weight = $WEIGHT;
    sum += weight;
    if (t == 0u) {
      ids[p.ids_at + g.x * p.ids_row + k] = i;
      y[p.y_at + g.x * p.y_row + k] = weight;
    }
  }
  let over = select(sum + $LEAST, $WHOLE, p.over_all == 1u);
  for (var k = 0u; k < p.n_used && t == 0u; k++) {
    let at = p.y_at + g.x * p.y_row + k;
    y[at] = y[at] / over * p.factor$TIMES;
  }
}
