// 176 bytes: d dmin | scales 12 | qh 32 | qs 128
struct Head { at: u32, high: u32, sub: u32, d: f32, m: f32 }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 44u;
  let sub = j & 7u;
  let dm = unpack2x16float(word(r, block));
  let s0 = word(r, block + 1u);
  let s1 = word(r, block + 2u);
  let s2 = word(r, block + 3u);
  let shift = 8u * (sub & 3u);
  var scale = (s0 >> shift) & 63u;
  var minimum = (s1 >> shift) & 63u;
  if (sub > 3u) {
    scale = ((s2 >> shift) & 15u) | (((s0 >> shift) & 0xc0u) >> 2u);
    minimum = ((s2 >> (shift + 4u)) & 15u) | (((s1 >> shift) & 0xc0u) >> 2u);
  }
  return Head(block + 12u + (sub >> 1u) * 8u, block + 4u, sub, dm.x * f32(scale), dm.y * f32(minimum));
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (word(r, h.at + i) >> (4u * (h.sub & 1u))) & 0x0f0f0f0fu;
  let high = (word(r, h.high + i) >> h.sub) & 0x01010101u;
  return h.d * u8x4(low | (high << 4u)) - h.m;
}
