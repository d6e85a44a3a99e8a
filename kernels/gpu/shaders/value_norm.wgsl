var sum = 0.0;
    for (var d = t; d < p.dim_v; d += 64u) { let v = $v[value + d]; sum = fma(v, v, sum); }
    let factor = 1.0 / sqrt(total(sum, t) / f32(p.dim_v) + p.eps);
