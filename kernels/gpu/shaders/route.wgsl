// The n_used largest logits of a row, the first of equals first, and their softmax, over them or over all.
struct P { n: u32, n_used: u32, over_all: u32, x_at: u32, x_row: u32, ids_at: u32, ids_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
$SCALES
var<immediate> p: P;
$KEYS
fn before(u: vec2<u32>, v: vec2<u32>) -> bool { return u.x > v.x || (u.x == v.x && u.y < v.y); }
fn earlier(u: vec2<u32>, v: vec2<u32>) -> vec2<u32> { return select(u, v, before(v, u)); }
$FIRST_OF
$TOTAL
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.x * p.x_row;
  var last = vec2<u32>(0xffffffffu, 0u);
  var first = 0.0;
  var sum = 0.0;
  for (var k = 0u; k < p.n_used; k++) {
    var mine = vec2<u32>(0u, 0xffffffffu);
    for (var i = t; i < p.n; i += 64u) {
      let one = vec2<u32>(key(bitcast<u32>(x[begin + i])), i);
      if ((k == 0u || before(last, one)) && before(one, mine)) { mine = one; }
    }
    last = first_of(mine, t);
    if (k == 0u) { first = bitcast<f32>(unkey(last.x)); }
    let power = exp(bitcast<f32>(unkey(last.x)) - first);
    sum += power;
    if (t == 0u) {
      ids[p.ids_at + g.x * p.ids_row + k] = min(last.y, p.n - 1u);
      y[p.y_at + g.x * p.y_row + k] = power;
    }
  }
  if (p.over_all == 1u) {
    sum = 0.0;
    for (var i = t; i < p.n; i += 64u) { sum += exp(x[begin + i] - first); }
    sum = total(sum, t);
  }
  for (var k = 0u; k < p.n_used && t == 0u; k++) {
    let at = p.y_at + g.x * p.y_row + k;
    y[at] = y[at] / sum$TIMES;
  }
}
