// 144 bytes: d dmin | scales 12 | qs 128
$SCALES
struct Head { at: u32, shift: u32, d: f32, m: f32 }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 36u;
  let sub = j & 7u;
  let dm = scale_and_minimum(r, block, sub);
  return Head(block + 4u + (sub >> 1u) * 8u, 4u * (sub & 1u), dm.x, dm.y);
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.d * u8x4((word(r, h.at + i) >> h.shift) & 0x0f0f0f0fu) - h.m;
}
