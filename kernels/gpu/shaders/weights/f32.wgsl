struct Head { at: u32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 32u); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let at = h.at + 4u * i;
  return bitcast<vec4<f32>>(vec4<u32>(word(r, at), word(r, at + 1u), word(r, at + 2u), word(r, at + 3u)));
}
