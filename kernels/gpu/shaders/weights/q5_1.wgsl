struct Head { at: u32, dm: vec2<f32>, high: u32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 6u + 2u, unpack2x16float(word(r, j * 6u)), word(r, j * 6u + 1u)); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (word(r, h.at + (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu;
  return h.dm.x * u8x4(low | fifth(h.high >> (4u * i))) + h.dm.y;
}
