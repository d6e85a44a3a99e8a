// 136 bytes: d | scales_h 2 | scales_l 4 | qs 128
$LEVELS
struct Head { at: u32, d: f32 }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 34u;
  let sub = j & 7u;
  let first = word(r, block);
  let scale = ((word(r, block + 1u) >> (4u * sub)) & 15u) | (((first >> (16u + 2u * sub)) & 3u) << 4u);
  return Head(block + 2u + 4u * sub, unpack2x16float(first & 0xffffu).x * (f32(scale) - 32.0));
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.d * levels((word(r, h.at + (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu);
}
