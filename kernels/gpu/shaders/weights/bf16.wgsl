struct Head { at: u32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 16u); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let u = word(r, h.at + 2u * i);
  let v = word(r, h.at + 2u * i + 1u);
  return bitcast<vec4<f32>>(vec4<u32>(u << 16u, u & 0xffff0000u, v << 16u, v & 0xffff0000u));
}
