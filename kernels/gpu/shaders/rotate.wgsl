// A head of a token, turned as in rope.wgsl.
var<workgroup> head: array<f32, $DIM>;
fn rotate(token: u32, rope: u32, t: u32) {
  for (var d = t; d < p.half; d += 64u) {
    let first = select(d, 2u * d, p.adjacent == 1u);
    let second = select(d + p.half, 2u * d + 1u, p.adjacent == 1u);
    let angle = b[32u + rope] + token * 2u * p.half + d;
    let c = bitcast<f32>(b[angle]);
    let s = bitcast<f32>(b[angle + p.half]);
    let u = head[first];
    let v = head[second];
    head[first] = fma(u, c, -(v * s));
    head[second] = fma(v, c, u * s);
  }
}
