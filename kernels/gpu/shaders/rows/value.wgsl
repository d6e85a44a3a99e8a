for (var i = t; i < $WIDTH; i += 256u) {
  let u = $x[x + i];
  let v = $y[y + i / $PER];
  $z[z + i] = $FUNCTION;
}
