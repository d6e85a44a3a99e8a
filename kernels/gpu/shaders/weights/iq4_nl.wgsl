$LEVELS
struct Head { at: u32, d: f32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 18u + 2u, half_at(r, j * 18u)); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.d * levels((bytes4(r, h.at + 4u * (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu);
}
