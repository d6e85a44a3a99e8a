// Every sum of products is an fma that says so: it has the same bits in every shader that has it.
fn silu(v: f32) -> f32 {
  let half = 0.5 * v;
  return fma(half, tanh(clamp(half, -20.0, 20.0)), half);
}
fn gelu(v: f32) -> f32 {
  let half = 0.5 * v;
  let cubic = fma(0.044715 * v * v, v, v);
  return fma(half, tanh(clamp(0.7978845608028654 * cubic, -20.0, 20.0)), half);
}
