struct Head { at: u32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 16u); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> {
  let at = h.at + 2u * i;
  return vec4<f32>(unpack2x16float(word(r, at)), unpack2x16float(word(r, at + 1u)));
}
