// What rms_norm.wgsl makes of a column of x, with its order of additions: 64 threads a column.
@group(0) @binding(3) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> normed_x: array<vec4<f32>>;
var<workgroup> squares: array<f32, 64u * $COLS>;
var<workgroup> sums: array<f32, 8u * $COLS>;
fn norm_columns(t: u32) {
  for (var c = t / 64u; c < $COLS; c += 4u) {
    let begin = p.x_at + min(c, p.m - 1u) * p.x_row;
    var sum = 0.0;
    for (var i = t % 64u; i < p.pieces * 32u; i += 64u) { let v = x[begin + i / 4u][i % 4u]; sum = fma(v, v, sum); }
    squares[c * 64u + t % 64u] = sum;
  }
  workgroupBarrier();
  if (t < 8u * $COLS) {
    let at = t / 8u * 64u + t % 8u;
    sums[t] = $UPPER;
  }
  workgroupBarrier();
}
fn factor_of(c: u32) -> f32 { let at = c * 8u; return 1.0 / sqrt($LOWER / f32(p.pieces * 32u) + p.eps); }
fn normed(at: u32, i: u32, factor: f32) -> vec4<f32> { return x[at + i] * factor * scales[i]; }
fn keep_normed(t: u32) {
  for (var i = t; i < p.m * p.pieces * 8u; i += 256u) {
    let c = i / (p.pieces * 8u);
    let at = i % (p.pieces * 8u);
    normed_x[p.h_at + c * p.h_row + at] = normed(p.x_at + c * p.x_row, at, factor_of(c));
  }
}
