// The sum of a number of each of 64 threads.
fn total(mine: f32, t: u32) -> f32 {
  workgroupBarrier();
  part[t] = mine;
  workgroupBarrier();
  for (var half = 32u; half > 0u; half /= 2u) {
    if (t < half) { part[t] += part[t + half]; }
    workgroupBarrier();
  }
  return part[0];
}
