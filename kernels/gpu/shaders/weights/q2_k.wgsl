// 84 bytes: scales 16 | qs 64 | d dmin. A piece of 32 weights has two scales.
struct Head { at: u32, shift: u32, scales: vec2<f32>, minima: vec2<f32> }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 21u;
  let sub = j & 7u;
  let both = word(r, block + (sub >> 1u)) >> (16u * (sub & 1u));
  let dm = unpack2x16float(word(r, block + 20u));
  let scales = dm.x * vec2<f32>(vec2<u32>(both & 15u, (both >> 8u) & 15u));
  let minima = dm.y * vec2<f32>(vec2<u32>((both >> 4u) & 15u, (both >> 12u) & 15u));
  return Head(block + 4u + (sub >> 2u) * 8u, 2u * (sub & 3u), scales, minima);
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let q = u8x4((word(r, h.at + i) >> h.shift) & 0x03030303u);
  if (i < 4u) { return h.scales.x * q - h.minima.x; }
  return h.scales.y * q - h.minima.y;
}
