// 110 bytes: hmask 32 | qs 64 | scales 12 | d. A piece of 32 weights has two scales.
struct Head { mask: u32, low: u32, sub: u32, scales: vec2<f32> }
fn scale_of(r: u32, at: u32, s: u32) -> f32 {
  let low = (byte_at(r, at + (s & 7u)) >> (4u * (s >> 3u))) & 15u;
  let high = (byte_at(r, at + 8u + (s & 3u)) >> (2u * (s >> 2u))) & 3u;
  return f32(low | (high << 4u)) - 32.0;
}
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 110u;
  let sub = j & 7u;
  let scales = vec2<f32>(scale_of(r, block + 96u, 2u * sub), scale_of(r, block + 96u, 2u * sub + 1u));
  return Head(block, block + 32u + (sub >> 2u) * 32u, sub, half_at(r, block + 108u) * scales);
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (bytes4(r, h.low + 4u * i) >> (2u * (h.sub & 3u))) & 0x03030303u;
  let high = (bytes4(r, h.mask + 4u * i) >> h.sub) & 0x01010101u;
  return select(h.scales.y, h.scales.x, i < 4u) * (u8x4(low | (high << 2u)) - 4.0);
}
