// Of a block that begins with d, dmin and 12 bytes of eight scales and minima, of 6 bits each.
fn scale_and_minimum(r: u32, block: u32, sub: u32) -> vec2<f32> {
  let s0 = word(r, block + 1u);
  let s1 = word(r, block + 2u);
  let s2 = word(r, block + 3u);
  let shift = 8u * (sub & 3u);
  var both = vec2<u32>((s0 >> shift) & 63u, (s1 >> shift) & 63u);
  if (sub > 3u) {
    both = vec2<u32>((s2 >> shift) & 15u, (s2 >> (shift + 4u)) & 15u) | ((vec2<u32>(s0, s1) >> vec2<u32>(shift)) & vec2<u32>(0xc0u)) >> vec2<u32>(2u);
  }
  return unpack2x16float(word(r, block)) * vec2<f32>(both);
}
