// z_i = x_i + a factor of the stream times y, for the streams of x from $FIRST on; the others are left as they are
for (var i = t; i < $WIDTH; i += 256u) {
  let s = i / $STREAM;
  var value = $x[x + i];
  if (s >= $FIRST) { value = fma($FACTOR, $y[y + i % $STREAM], value); }
  $z[z + i] = value;
}
