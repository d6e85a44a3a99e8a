fn pack_$ARRAY(source: u32, out: u32, dots: u32, lanes: u32, item: u32) {  // places in words
  let quad = item / (lanes / 16u);
  let g = item % (lanes / 16u);
  var codes: array<u32, 4>;
  var scales = 0u;
  var minima = 0u;
  for (var j = 0u; j < 4u; j++) {
    let at = source + ((4u * quad + j) * lanes + g * 16u) / 2u;
    var x: array<f32, 16>;
    var not_finite = false;
    for (var i = 0u; i < 8u; i++) {
      let w = newest_$ARRAY[at + i];
      not_finite = not_finite || (w & 0x7c00u) == 0x7c00u || (w & 0x7c000000u) == 0x7c000000u;
      let pair = unpack2x16float(w);
      x[2u * i] = pair.x;
      x[2u * i + 1u] = pair.y;
    }
    var low = x[0];
    var high = x[0];
    for (var i = 1u; i < 16u; i++) {
      low = min(low, x[i]);
      high = max(high, x[i]);
    }
    var best = levels_of(&x, low, high, $WHOLE, $BETWEEN);
    let narrow = levels_of(&x, low, high, $NARROW, $AT);
    if (narrow.error < best.error) { best = narrow; }
    for (var i = 0u; i < 16u; i++) { codes[i / 4u] |= (code_of(x[i], best.least, best.by) & 3u) << (8u * (i % 4u) + 2u * j); }
    scales |= select(best.scale, 255u, not_finite) << (8u * j);  // what is not finite has to stay visible
    minima |= (best.minimum & 255u) << (8u * j);
  }
  for (var i = 0u; i < 4u; i++) { $ARRAY[out + quad * (lanes / 4u) + g * 4u + i] = codes[i]; }
  let behind = out + dots * lanes / 16u + g * (dots / 4u) + quad;
  $ARRAY[behind] = scales;
  $ARRAY[behind + dots * lanes / 64u] = minima;
}
