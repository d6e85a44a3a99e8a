// A row of x is normed and added to one of r, which may be normed, too: rms_norm.wgsl, a sum, and rms_norm.wgsl.
// ``nothing`` is 0: what a driver does not know keeps it from making one fma of the product and the sum, whose bits
// would be others than those of single ops.
struct P { width: u32, nothing: u32, x_at: u32, x_row: u32, r_at: u32, r_row: u32, y_at: u32, y_row: u32, eps: f32, next_eps: f32 }
@group(0) @binding(0) var<storage, read> w: array<f32>;
$BINDINGS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let x = p.x_at + g.y * p.x_row;
  let r = p.r_at + g.y * p.r_row;
  var sum = 0.0;
  for (var i = t; i < p.width; i += 64u) { let v = $x[x + i]; sum = fma(v, v, sum); }
  let factor = factor_of(sum, p.eps, t);
  sum = 0.0;
  for (var i = t; i < p.width; i += 64u) {
    let normed = bitcast<f32>(bitcast<u32>($x[x + i] * factor * w[i]) ^ p.nothing);
    let v = $r[r + i] + normed;
    $r[r + i] = v;
    sum = fma(v, v, sum);
  }
  $NEXT
}
fn factor_of(sum: f32, eps: f32, t: u32) -> f32 { return 1.0 / sqrt(total(sum, t) / f32(p.width) + eps); }
$TOTAL
