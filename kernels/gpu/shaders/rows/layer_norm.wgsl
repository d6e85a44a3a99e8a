var sum = 0.0;
for (var i = first; i < $WIDTH; i += 64u) { sum += $x[x + i]; }
let mean = total(sum, t) / f32($WIDTH);
sum = 0.0;
for (var i = first; i < $WIDTH; i += 64u) { let v = $x[x + i] - mean; sum = fma(v, v, sum); }
let factor = 1.0 / sqrt(total(sum, t) / f32($WIDTH) + $EPS);
for (var i = t; i < $WIDTH; i += 256u) { $z[z + i] = fma(($x[x + i] - mean) * factor, w[$W + i], $BIAS); }
