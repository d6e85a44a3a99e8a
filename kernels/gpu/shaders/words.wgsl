// A weight's rows lie word by word beside each other, 32 rows together: word i of row r is at (r / 32 * words + i) * 32 +
// r % 32. So neighbouring threads that own neighbouring rows read neighbouring words.
fn row_base(row: u32) -> u32 { return (row / 32u) * p.words * 32u + row % 32u; }
fn word(r: u32, i: u32) -> u32 { return w[r + i * 32u]; }
fn bytes4(r: u32, at: u32) -> u32 {  // the four bytes from byte ``at`` of a row on
  let low = word(r, at >> 2u);
  let shift = (at & 3u) * 8u;
  if (shift == 0u) { return low; }
  return (low >> shift) | (word(r, (at >> 2u) + 1u) << (32u - shift));
}
fn byte_at(r: u32, at: u32) -> u32 { return (word(r, at >> 2u) >> ((at & 3u) * 8u)) & 0xffu; }
fn half_at(r: u32, at: u32) -> f32 { return unpack2x16float((word(r, at >> 2u) >> ((at & 2u) * 8u)) & 0xffffu).x; }
fn fifth(h: u32) -> u32 { return ((h & 1u) << 4u) | ((h & 2u) << 11u) | ((h & 4u) << 18u) | ((h & 8u) << 25u); }  // of the fifth bits of four codes
fn u8x4(v: u32) -> vec4<f32> { return vec4<f32>((vec4<u32>(v) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu)); }
fn i8x4(v: u32) -> vec4<f32> { return vec4<f32>((vec4<i32>(bitcast<i32>(v)) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u)); }
fn mac(sum: f32, v: vec4<f32>, x: vec4<f32>) -> f32 {  // from left to right: every product adds up in this order
  return fma(v.w, x.w, fma(v.z, x.z, fma(v.y, x.y, fma(v.x, x.x, sum))));
}
