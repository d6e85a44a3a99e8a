// A workgroup for what is rotated of each query head of a token, which goes behind the head's latent part; and one for its
// latent key, which is normed and stored, and behind it what all heads rotate of a key.
struct P { heads: u32, whole: u32, plain: u32, latent: u32, half: u32, adjacent: u32, rope: u32, group: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32, k_at: u32, k_row: u32, eps: f32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> kept: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
$BINDINGS
var<immediate> p: P;
$PUT
$TOTAL
$ROTATE
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let token = g.y;
  let is_key = g.x == p.heads;
  let k = p.k_at + token * p.k_row;
  let x = p.x_at + token * p.x_row + g.x * p.whole + p.plain;
  for (var d = t; d < $ROT; d += 64u) { if (is_key) { head[d] = $k[k + p.latent + d]; } else { head[d] = $x[x + d]; } }
  workgroupBarrier();
  rotate(token, p.rope, t);
  workgroupBarrier();
  if (!is_key) {
    let y = p.y_at + token * p.y_row + g.x * (p.latent + $ROT) + p.latent;
    for (var d = t; d < $ROT; d += 64u) { $y[y + d] = head[d]; }
    return;
  }
  var sum = 0.0;
  for (var d = t; d < p.latent; d += 64u) { let v = $k[k + d]; sum = fma(v, v, sum); }
  let factor = 1.0 / sqrt(total(sum, t) / f32(p.latent) + p.eps);
  let at = position_of(token);
  let e = (table_entry(p.group, token, at / 32u) * 32u + at % 32u) * (p.latent + $ROT);
  for (var d = t; d < p.latent; d += 64u) { put_kept(e + d, $k[k + d] * factor * w[d]); }
  for (var d = t; d < $ROT; d += 64u) { put_kept(e + p.latent + d, head[d]); }
}
$STEP
