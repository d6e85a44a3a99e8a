// The batch of the next step: each sequence goes on with a token drawn as the host will draw it (kernels/cpu/kernels/draw.py,
// in float64), which looks at it later, and with the state that was just written. A thread owns a sequence.
// chains, row by row: 0 candidates | 1 links | 2 uniform numbers used | 3 uniform numbers | then kind, amount and least
struct P { n: u32, n_vocab: u32, found_at: u32, found_row: u32 }
@group(0) @binding(0) var<storage, read_write> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> found: array<u32>;
@group(0) @binding(2) var<storage, read_write> chains: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) t: u32) {
  if (t < p.n) {
    let row = p.found_at + t * p.found_row;
    let token = min(found[row + 4u + 2u * drawn(row, t * $WORDS)], p.n_vocab - 1u);
    found[row + 3u] = token;
    b[64u + t] = token;
    b[b[2] + t] += 1u;
    $STATES
  }
  if (t == 0u) {
    $ANGLES
  }
}
fn drawn(row: u32, chain: u32) -> u32 {
  var v: array<f32, $MAX_K>;
  var n = u32(chains[chain]);
  for (var i = 0u; i < n; i++) { v[i] = bitcast<f32>(found[row + 5u + 2u * i]); }
  for (var link = 0u; link < u32(chains[chain + 1u]) && n > 1u; link++) {
    let at = chain + 3u + $AHEAD + 3u * link;
    let amount = chains[at + 1u];
    let least = u32(chains[at + 2u]);
    switch u32(chains[at]) {
      case $TOP_K { n = min(n, u32(amount)); }
      case $TOP_P {
        var whole = 0.0;
        for (var i = 0u; i < n; i++) { whole += exp(v[i] - v[0]); }
        var reached = 0.0;
        var i = 0u;
        while (i < n && reached < amount * whole) {
          reached += exp(v[i] - v[0]);
          i += 1u;
        }
        n = min(n, max(max(i, 1u), least));
      }
      case $MIN_P { while (n > least && v[n - 1u] < v[0] + amount) { n -= 1u; } }
      default {
        if (amount <= 0.0) { n = 1u; }
        for (var i = 0u; i < n && n > 1u; i++) { v[i] /= amount; }
      }
    }
  }
  if (n <= 1u) { return 0u; }
  var whole = 0.0;
  for (var i = 0u; i < n; i++) { whole += exp(v[i] - v[0]); }
  let used = u32(chains[chain + 2u]);
  chains[chain + 2u] = f32(used + 1u);
  let share = chains[chain + 3u + used] * whole;
  var reached = 1.0;
  var place = 0u;
  while (place < n - 1u && reached <= share) {
    place += 1u;
    reached += exp(v[place] - v[0]);
  }
  return place;
}
