// How much of a state stays, and how far it moves, of a number or two: a thread for each head of a token. w: a, then dt_bias.
struct P { heads: u32, n: u32, first_at: u32, first_row: u32, second_at: u32, second_row: u32, decay_at: u32, decay_row: u32, rate_at: u32, rate_row: u32 }
@group(0) @binding(0) var<storage, read> w: array<f32>;
$BINDINGS
var<immediate> p: P;
$FUNCTIONS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(num_workgroups) ng: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (g.y * ng.x + g.x) * 64u + t;
  if (i >= p.n) { return; }
  let row = i / p.heads;
  let head = i % p.heads;
  let first = $first[p.first_at + row * p.first_row + head];
  let second = $second[p.second_at + row * p.second_row + head];
  let rate = $RATE;
  $decay[p.decay_at + row * p.decay_row + head] = $DECAY;
  $rate[p.rate_at + row * p.rate_row + head] = rate;
}
