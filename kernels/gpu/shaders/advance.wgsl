// The batch of the next step: each sequence goes on with the largest of its logits, which the host looks at later, and
// with the state that was just written.
struct P { n: u32, n_vocab: u32, from_at: u32, from_row: u32 }
@group(0) @binding(0) var<storage, read_write> b: array<u32>;
@group(0) @binding(1) var<storage, read> found: array<u32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) t: u32) {
  if (t < p.n) {
    b[64u + t] = min(found[p.from_at + t * p.from_row + 4u], p.n_vocab - 1u);
    b[b[2] + t] += 1u;
    $STATES
  }
  if (t == 0u) {
    $ANGLES
  }
}
