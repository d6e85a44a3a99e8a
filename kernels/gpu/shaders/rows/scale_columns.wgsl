for (var i = t; i < $WIDTH; i += 256u) { $z[z + i] = $x[x + i] * w[$W + i]; }
