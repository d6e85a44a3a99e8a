// 210 bytes: ql 128 | qh 64 | scales 16 | d. A piece of 32 weights has two scales.
struct Head { low: u32, high: u32, quarter: u32, scales: vec2<f32> }
fn head(r: u32, j: u32) -> Head {
  let block = (j >> 3u) * 210u;
  let sub = j & 7u;
  let quarter = sub & 3u;
  let both = bitcast<i32>(bytes4(r, block + 192u + 2u * sub));
  let scales = half_at(r, block + 208u) * vec2<f32>(vec2<i32>((both << 24u) >> 24u, (both << 16u) >> 24u));
  return Head(block + (sub >> 2u) * 64u + (quarter & 1u) * 32u, block + 128u + (sub >> 2u) * 32u, quarter, scales);
}
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let low = (bytes4(r, h.low + 4u * i) >> (4u * (h.quarter >> 1u))) & 0x0f0f0f0fu;
  let high = (bytes4(r, h.high + 4u * i) >> (2u * h.quarter)) & 0x03030303u;
  return select(h.scales.y, h.scales.x, i < 4u) * (u8x4(low | (high << 4u)) - 32.0);
}
