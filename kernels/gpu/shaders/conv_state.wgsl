// Of a sequence's last token: the last rows that are convolved, as its state. Row k comes from row k + n of the old one: in
// this order none is lost where the old one is written over.
fn keep_state(token: u32, channel: u32) {
  let start = b[b[4] + token];
  if (token + 1u < b[0] && b[b[4] + token + 1u] == start) { return; }
  let slot = table_entry(p.group, token, 0u);
  let to = table_entry(p.group, token, 1u);
  for (var k = 0u; k < $TAPS - 1u; k++) {
    let back = $TAPS - 2u - k;
    var u = 0.0;
    if (token >= start + back) {
      let row = p.x_at + (token - back) * p.x_row + channel;
      u = $VALUE;
    } else if (slot != 0xffffffffu) {
      u = states[(slot * ($TAPS - 1u) + token - start + 1u + k) * p.width + channel];
    }
    states[(to * ($TAPS - 1u) + k) * p.width + channel] = u;
  }
}
