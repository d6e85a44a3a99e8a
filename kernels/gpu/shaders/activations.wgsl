// Every sum of products is an fma that says so: it has the same bits in every shader that has it.
fn bounded_tanh(v: f32) -> f32 { return tanh(clamp(v, -20.0, 20.0)); }
fn sigmoid(v: f32) -> f32 { return fma(0.5, bounded_tanh(0.5 * v), 0.5); }
fn softcap(v: f32, cap: f32) -> f32 { return cap * bounded_tanh(v / cap); }
fn silu(gate: f32, up: f32) -> f32 {
  let half = 0.5 * gate;
  return fma(half, bounded_tanh(half), half) * up;
}
fn gelu(gate: f32, up: f32) -> f32 {
  let half = 0.5 * gate;
  let cubic = fma(0.044715 * gate * gate, gate, gate);
  return fma(half, bounded_tanh(0.7978845608028654 * cubic), half) * up;
}
fn clamped_swiglu(gate: f32, up: f32) -> f32 {
  let cut = min(gate, 7.0);
  return cut * sigmoid(1.702 * cut) * (clamp(up, -7.0, 7.0) + 1.0);
}
fn softplus(v: f32) -> f32 { return max(v, 0.0) + log(1.0 + exp(-abs(v))); }
