// Second: the bits from which on there are k. The counts are made zero for the next token.
struct P { k: u32, slices: u32 }
@group(0) @binding(0) var<storage, read_write> state: array<u32>;
var<immediate> p: P;
var<workgroup> sums: array<u32, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = g.y * (4u + p.slices + 4096u);  // of this row's state
  let counts = at + 4u + p.slices;
  var sum = 0u;
  for (var i = 0u; i < 16u; i++) { sum += state[counts + t * 16u + i]; }
  sums[t] = sum;
  workgroupBarrier();
  if (t == 0u) {
    var left = p.k;
    var i = 255u;
    while (i > 0u && sums[i] < left) { left -= sums[i]; i -= 1u; }
    var j = 15u;
    while (j > 0u && state[counts + i * 16u + j] < left) { left -= state[counts + i * 16u + j]; j -= 1u; }
    state[at + 2u] = i * 16u + j;
  }
  storageBarrier();
  workgroupBarrier();
  for (var i = 0u; i < 16u; i++) { state[counts + t * 16u + i] = 0u; }
}
