struct Head { at: u32, d: f32, high: u32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 22u + 6u, half_at(r, j * 22u), bytes4(r, j * 22u + 2u)); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (bytes4(r, h.at + 4u * (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu;
  return h.d * (u8x4(low | fifth(h.high >> (4u * i))) - 16.0);
}
