var sum = 0.0;
  for (var d = t; d < p.dim_k; d += 64u) { let v = head[d]; sum = fma(v, v, sum); }
  let factor = 1.0 / sqrt(total(sum, t) / f32(p.dim_k) + p.eps);
  for (var d = t; d < p.dim_k; d += 64u) { head[d] = head[d] * factor * w[select(0u, p.dim_k, is_key) + d]; }
