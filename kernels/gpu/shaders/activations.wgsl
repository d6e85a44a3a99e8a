// Every sum of products is an fma that says so: it has the same bits in every shader that has it.
fn bounded_tanh(v: f32) -> f32 { return tanh(clamp(v, -20.0, 20.0)); }
fn sigmoid(v: f32) -> f32 { return 1.0 / (1.0 + exp(-max(v, -80.0))); }  // by tanh it loses what is small
fn softcap(v: f32, cap: f32) -> f32 { return cap * bounded_tanh(v / cap); }
fn silu(gate: f32, up: f32) -> f32 { return gate * sigmoid(gate) * up; }
fn gelu(gate: f32, up: f32) -> f32 {
  let cubic = fma(0.044715 * gate * gate, gate, gate);
  return gate * sigmoid(1.5957691216057308 * cubic) * up;
}
fn clamped_swiglu(gate: f32, up: f32) -> f32 {
  let cut = min(gate, 7.0);
  return cut * sigmoid(1.702 * cut) * (clamp(up, -7.0, 7.0) + 1.0);
}
fn softplus(v: f32) -> f32 {  // log(1 + y) of y = e^-|v| as 2 atanh(y / (2 + y)): what is small keeps its digits
  let y = exp(-min(abs(v), 80.0));
  let s = y / (2.0 + y);
  let z = s * s;
  let odd = fma(z, fma(z, fma(z, fma(z, fma(z, fma(z, fma(z, 1.0 / 15.0, 1.0 / 13.0), 1.0 / 11.0), 1.0 / 9.0), 1.0 / 7.0), 0.2), 1.0 / 3.0), 1.0);
  return fma(2.0 * s, odd, max(v, 0.0));
}
fn gelu_erf(gate: f32, up: f32) -> f32 {  // by a rational form of erf that is off by 1.5e-7 at most
  let z = 0.7071067811865476 * abs(gate);
  let t = 1.0 / fma(0.3275911, z, 1.0);
  let series = t * fma(t, fma(t, fma(t, fma(t, 1.061405429, -1.453152027), 1.421413741), -0.284496736), 0.254829592);
  let tail = 0.5 * series * exp(-z * z);
  return gate * select(fma(-0.5 * series, exp(-z * z), 1.0), tail, gate < 0.0) * up;
}
fn relu_squared(v: f32) -> f32 { return max(v, 0.0) * max(v, 0.0); }
