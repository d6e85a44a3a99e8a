// 176 bytes: d dmin | scales 12 | qh 32 | qs 128
$SCALES
struct Head { at: u32, high: u32, sub: u32, d: f32, m: f32 }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 44u;
  let sub = j & 7u;
  let dm = scale_and_minimum(r, block, sub);
  return Head(block + 12u + (sub >> 1u) * 8u, block + 4u, sub, dm.x, dm.y);
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (word(r, h.at + i) >> (4u * (h.sub & 1u))) & 0x0f0f0f0fu;
  let high = (word(r, h.high + i) >> h.sub) & 0x01010101u;
  return h.d * u8x4(low | (high << 4u)) - h.m;
}
