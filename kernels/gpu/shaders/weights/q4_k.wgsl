// 144 bytes: d dmin | scales 12 | qs 128
struct Head { at: u32, shift: u32, d: f32, m: f32 }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 36u;
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
  return Head(block + 4u + (sub >> 1u) * 8u, 4u * (sub & 1u), dm.x * f32(scale), dm.y * f32(minimum));
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.d * u8x4((word(r, h.at + i) >> h.shift) & 0x0f0f0f0fu) - h.m;
}
