// each stream of x brought to the length of y
var sum = 0.0;
for (var i = first; i < $WIDTH; i += 64u) { let v = $y[y + i]; sum = fma(v, v, sum); }
let wanted = total(sum, t) / f32($WIDTH);
for (var s = 0u; s < $N; s++) {
  let at = s * $WIDTH;
  sum = 0.0;
  for (var i = first; i < $WIDTH; i += 64u) { let v = $x[x + at + i]; sum = fma(v, v, sum); }
  let factor = sqrt(wanted / max(total(sum, t) / f32($WIDTH), $LEAST));
  for (var i = t; i < $WIDTH; i += 256u) { $z[z + at + i] = $x[x + at + i] * factor; }
}
