// 17 bytes: e | qs 16; the scale is 2^(e - 128)
$LEVELS
struct Head { at: u32, d: f32 }
fn head(r: u32, j: u32) -> Head {
  let e = byte_at(r, j * 17u);
  return Head(j * 17u + 1u, bitcast<f32>(select(0x200000u << e, (e - 1u) << 23u, e > 1u)));
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  return h.d * levels((bytes4(r, h.at + 4u * (i & 3u)) >> (i & 4u)) & 0x0f0f0f0fu);
}
