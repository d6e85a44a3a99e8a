fn levels_of_$ARRAY(source: u32) -> Levels {  // place in words
  var x: array<f32, 32>;
  var not_finite = false;
  for (var i = 0u; i < 16u; i++) {
    let w = newest_$ARRAY[source + i];
    not_finite = not_finite || (w & 0x7c00u) == 0x7c00u || (w & 0x7c000000u) == 0x7c000000u;
    let pair = unpack2x16float(w);
    x[2u * i] = pair.x;
    x[2u * i + 1u] = pair.y;
  }
  var low = x[0];
  var high = x[0];
  for (var i = 1u; i < 32u; i++) {
    low = min(low, x[i]);
    high = max(high, x[i]);
  }
  var best = levels_of(&x, low, high, $WHOLE, $BETWEEN, $HIGHEST, $PER_SCALE);
  let narrow = levels_of(&x, low, high, $NARROW, $AT, $HIGHEST, $PER_SCALE);
  if (narrow.error < best.error) { best = narrow; }
  best.scale = select(best.scale, 255u, not_finite);  // what is not finite has to stay visible
  return best;
}
fn code_of_$ARRAY(source: u32, lanes: u32, dot: u32, lane: u32) -> u32 {
  let pair = unpack2x16float(newest_$ARRAY[source + (dot * lanes + lane) / 2u]);
  let at = (dot * lanes + lane) / 32u;
  return code_of(select(pair.x, pair.y, lane % 2u == 1u), found[at].least, found[at].by, $HIGHEST);
}
fn codes_of_$ARRAY(source: u32, lanes: u32, dot: u32, lane: u32) -> u32 {  // every second of eight
  var codes = 0u;
  for (var i = 0u; i < 4u; i++) { codes |= code_of_$ARRAY(source, lanes, dot + 2u * i, lane) << ($BITS * i); }
  return codes;
}
fn pack_$ARRAY(source: u32, out: u32, dots: u32, lanes: u32, t: u32) {
  let line = lanes / 2u;  // words
  for (var item = t; item < dots / $DOTS * line; item += 64u) {
    let dot = item / line * $DOTS;
    let at = item % line;
    $WORDS
  }
  let behind = out + dots * lanes * $BITS / 32u;
  for (var item = t; item < dots * lanes / 128u; item += 64u) {
    let first = item % (dots / 4u) * 4u * (lanes / 32u) + item / (dots / 4u);
    var scales = 0u;
    var minima = 0u;
    for (var i = 0u; i < 4u; i++) {
      scales |= (found[first + i * (lanes / 32u)].scale & 255u) << (8u * i);
      minima |= (found[first + i * (lanes / 32u)].minimum & 255u) << (8u * i);
    }
    $ARRAY[behind + item] = scales;
    $ARRAY[behind + dots * lanes / 128u + item] = minima;
  }
}
