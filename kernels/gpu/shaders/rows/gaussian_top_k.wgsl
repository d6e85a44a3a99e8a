// what of a row is beyond its mean and some deviations, less that
var sum = 0.0;
for (var i = first; i < $WIDTH; i += 64u) { sum += $x[x + i]; }
let mean = total(sum, t) / f32($WIDTH);
sum = 0.0;
for (var i = first; i < $WIDTH; i += 64u) { let v = $x[x + i] - mean; sum = fma(v, v, sum); }
let cutoff = fma($FACTOR, sqrt(total(sum, t) / f32($WIDTH)), mean);
for (var i = t; i < $WIDTH; i += 256u) { $z[z + i] = max($x[x + i] - cutoff, 0.0); }
