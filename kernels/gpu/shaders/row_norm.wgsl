let width = select(p.heads, p.kv_heads, is_key) * p.dim_k;
  var sum = 0.0;
  for (var i = t; i < width; i += 64u) {
    var v = 0.0;
    if (is_key) { v = $k[p.k_at + token * p.k_row + i]; } else { v = $q[p.q_at + token * p.q_row + i]; }
    sum = fma(v, v, sum);
  }
  let factor = 1.0 / sqrt(total(sum, t) / f32(width) + p.eps);
  let scales = select(g.x, p.heads + kv, is_key) * p.dim_k;
  for (var d = t; d < p.dim_k; d += 64u) { head[d] = head[d] * factor * w[scales + d]; }
