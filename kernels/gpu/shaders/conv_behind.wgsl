// short_conv.wgsl and conv_state.wgsl behind the product that makes x, for tokens that are alone in their sequences: the
// thread that has a channel has all that they need.
fn convolve(token: u32, channel: u32, x: f32) {
  let slot = table_entry(p.conv_group, token, 0u);
  let to = table_entry(p.conv_group, token, 1u) * ($TAPS - 1u);
  var sum = 0.0;
  for (var k = 0u; k < $TAPS - 1u; k++) {
    var u = 0.0;
    if (slot != 0xffffffffu) { u = states[(slot * ($TAPS - 1u) + k) * p.conv_n + channel]; }
    sum = fma(taps[k * p.conv_n + channel], u, sum);
    if (k > 0u) { states[(to + k - 1u) * p.conv_n + channel] = u; }  // row k is read by now, also where it is the same slot
  }
  states[(to + $TAPS - 2u) * p.conv_n + channel] = x;
  sum = fma(taps[($TAPS - 1u) * p.conv_n + channel], x, sum);
  convolved[p.conv_y_at + token * p.conv_y_row + channel] = silu(sum$BIASED, 1.0);
}
$STEP
