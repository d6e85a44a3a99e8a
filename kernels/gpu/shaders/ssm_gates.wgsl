// rate = softplus(dt + dt_bias) and decay = e^(a rate), a thread for each head of a token. w: a, then dt_bias.
struct P { heads: u32, n: u32, dt_at: u32, dt_row: u32, decay_at: u32, decay_row: u32, rate_at: u32, rate_row: u32 }
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
  let rate = softplus($dt[p.dt_at + row * p.dt_row + head] + w[p.heads + head]);
  $decay[p.decay_at + row * p.decay_row + head] = exp(w[head] * rate);
  $rate[p.rate_at + row * p.rate_row + head] = rate;
}
