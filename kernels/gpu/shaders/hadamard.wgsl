// Each $SIZE numbers of a row times the orthogonal Walsh-Hadamard matrix, in place, stage by stage.
struct P { x_at: u32, x_row: u32, factor: f32 }
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
var<immediate> p: P;
var<workgroup> v: array<f32, $SIZE>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let begin = p.x_at + g.y * p.x_row + g.x * $SIZE;
  for (var i = t; i < $SIZE; i += 64u) { v[i] = x[begin + i]; }
  workgroupBarrier();
  for (var half = 1u; half < $SIZE; half *= 2u) {
    for (var i = t; i < $SIZE / 2u; i += 64u) {
      let low = 2u * half * (i / half) + i % half;
      let first = v[low];
      let second = v[low + half];
      v[low] = first + second;
      v[low + half] = first - second;
    }
    workgroupBarrier();
  }
  for (var i = t; i < $SIZE; i += 64u) { x[begin + i] = v[i] * p.factor; }
}
