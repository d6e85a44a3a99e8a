// The n_used best experts of a token, the first of equals first, and their weights. They are chosen by the logits, or by
// scores: the softmax of the logits or the sigmoid of each, to which a bias may be added, of the best groups alone.
var<workgroup> choice: array<u32, $N>;  // keys of what experts are chosen by; 0 is below all of them
var<workgroup> of_group: array<f32, $N>;
$KEYS
fn before(u: vec2<u32>, v: vec2<u32>) -> bool { return u.x > v.x || (u.x == v.x && u.y < v.y); }
fn earlier(u: vec2<u32>, v: vec2<u32>) -> vec2<u32> { return select(u, v, before(v, u)); }
$FIRST_OF
$LARGEST_OF
$TOTAL
fn logistic(v: f32) -> f32 { return 1.0 / (1.0 + exp(-max(v, -80.0))); }
var<workgroup> found: u32;
fn routed(token: u32, slot: u32, writes: bool, t: u32) -> u32 {  // the expert of a slot, by how many come before it
  route(token, writes, t);
  for (var i = t; i < $N; i += $THREADS) {
    let mine = vec2<u32>(choice[i], i);
    var rank = 0u;
    for (var k = 0u; k < $N; k++) { rank += u32(before(vec2<u32>(choice[k], k), mine)); }
    if (rank == slot) { found = i; }
  }
  workgroupBarrier();
  return found;
}
fn route(token: u32, writes: bool, t: u32) {  // what all are chosen by, and where it ``writes`` which they are
  let begin = p.logits_at + token * p.logits_row;
  let first = select($N, t, t < 64u);  // a tree has 64 threads, the others of a workgroup have nothing in it
  var largest = -3.4e38;
  var sum = 0.0;
  var whole = 0.0;
  if (writes || $HAS_SCORES) {
    for (var i = first; i < $N; i += 64u) { largest = max(largest, logits[begin + i]); }
    largest = largest_of(largest, t);
    for (var i = first; i < $N; i += 64u) { sum += exp(logits[begin + i] - largest); }
    whole = total(sum, t);
  }
  for (var i = t; i < $N; i += $THREADS) { choice[i] = key(bitcast<u32>($SCORE$BIASED)); }
  workgroupBarrier();
  if (p.groups > 1u) {
    let size = $N / p.groups;
    for (var i = first; i < p.groups; i += 64u) {
      var best = 0u;
      var second = 0u;
      for (var k = i * size; k < (i + 1u) * size; k++) {
        if (choice[k] > best) { second = best; best = choice[k]; } else { second = max(second, choice[k]); }
      }
      of_group[i] = bitcast<f32>(unkey(best));
      if (p.best > 1u && size > 1u) { of_group[i] += bitcast<f32>(unkey(second)); }
    }
    workgroupBarrier();
    for (var i = first; i < $N; i += 64u) {
      let mine = i / size;
      var rank = 0u;
      for (var k = 0u; k < p.groups; k++) {
        if (of_group[k] > of_group[mine] || (of_group[k] == of_group[mine] && k < mine)) { rank += 1u; }
      }
      if (rank >= p.groups_used) { choice[i] = 0u; }
    }
    workgroupBarrier();
  }
  if (!writes) { return; }
  let at = p.probs_at + token * p.probs_row;
  var last = vec2<u32>(0xffffffffu, 0u);
  sum = 0.0;
  for (var k = 0u; k < p.n_used; k++) {
    var mine = vec2<u32>(0u, 0xffffffffu);
    for (var i = first; i < $N; i += 64u) {
      let one = vec2<u32>(choice[i], i);
      if ((k == 0u || before(last, one)) && before(one, mine)) { mine = one; }
    }
    last = first_of(mine, t);
    let i = min(last.y, $N - 1u);
    let weight = $WEIGHT;
    sum += weight;
    if (t == 0u) {
      ids[p.ids_at + token * p.ids_row + k] = i;
      probs[at + k] = weight;
    }
  }
  let over = select(sum + $LEAST, $WHOLE, p.over_all == 1u);
  for (var k = 0u; k < p.n_used && t == 0u; k++) { probs[at + k] = probs[at + k] / over * p.factor$TIMES; }
}
