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
fn gelu_erf(gate: f32, up: f32) -> f32 {  // by a rational form of erf that is off by 1.5e-7 at most
  let z = 0.7071067811865476 * abs(gate);
  let t = 1.0 / fma(0.3275911, z, 1.0);
  let series = t * fma(t, fma(t, fma(t, fma(t, 1.061405429, -1.453152027), 1.421413741), -0.284496736), 0.254829592);
  let tail = 0.5 * series * exp(-z * z);
  return gate * select(fma(-0.5 * series, exp(-z * z), 1.0), tail, gate < 0.0) * up;
}
fn relu_squared(v: f32) -> f32 { return max(v, 0.0) * max(v, 0.0); }
