// z_i = x_i + the sum over j of y[i n + j] x_j, for the $N streams of x: a thread owns columns of all of them
for (var i = t; i < $WIDTH; i += 256u) {
  var v: array<f32, $N>;
  for (var s = 0u; s < $N; s++) { v[s] = $x[x + s * $WIDTH + i]; }
  for (var s = 0u; s < $N; s++) {
    var sum = v[s];
    for (var j = 0u; j < $N; j++) { sum = fma($y[y + s * $N + j], v[j], sum); }
    $z[z + s * $WIDTH + i] = sum;
  }
}
