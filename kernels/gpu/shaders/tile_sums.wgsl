// 64 rows by 32 columns, 8 by 4 a thread, 32 weights deep at a time. A thread unpacks its row's for all.
let per = (p.pieces + $SLICES - 1u) / $SLICES;
var acc: array<f32, 32>;
var sum: array<f32, 32>;
for (var i = 0u; i < 32u; i++) { acc[i] = 0.0; sum[i] = 0.0; }
for (var j = 0u; j < p.pieces; j++) {
  let h = head(r, j);
  $UNPACK
  for (var i = t; i < 256u; i += 64u) {
    let c = i >> 3u;
    xs[c * 9u + (i & 7u)] = x[$INPUT + j * 8u + (i & 7u)];
  }
  workgroupBarrier();
  for (var i = 0u; i < 8u; i++) {
    for (var a = 0u; a < 8u; a++) {
      let v = ws[(tx + 8u * a) * 9u + i];
      for (var c = 0u; c < 4u; c++) { acc[a * 4u + c] = mac(acc[a * 4u + c], v, xs[(ty + 8u * c) * 9u + i]); }
    }
  }
  if ((j + 1u) % per == 0u || j + 1u == p.pieces) {
    for (var i = 0u; i < 32u; i++) { sum[i] += acc[i]; acc[i] = 0.0; }
  }
  workgroupBarrier();
}
