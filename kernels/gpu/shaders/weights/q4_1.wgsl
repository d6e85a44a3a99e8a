struct Head { at: u32, dm: vec2<f32> }
fn head(r: u32, j: u32) -> Head { return Head(j * 5u + 1u, unpack2x16float(word(r, j * 5u))); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.dm.x * u8x4((word(r, h.at + (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu) + h.dm.y;
}
